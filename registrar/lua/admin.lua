#!lua
-- An operator's word about one address, present or not.
--
-- KEYS  1 to 12 as in lib.lua
-- ARGV  1 to 4 as in lib.lua   5 addr
--       6 drain | maint | ready | weight   7 weight, '' = the instance's own again   8 reason
--       9 the service version that it must be of, '' = any
--       10 '1' = only of an address that somebody has, or that a word stands for
-- Returns {status, service version, 1 if the instance is there}, and what announce of lib.lua may add
--   OK    the word was written     SAME  it stood already; nothing written
--   STALE the service is of another version; nothing written
--   ABSENT nobody has the address; nothing written
local addr, verb, weight, reason = ARGV[5], ARGV[6], tonumber(ARGV[7]), ARGV[8]

-- lib

local bad = mistyped()
if bad then return bad end
local now = clock()
local here = redis.call('ZSCORE', KEYS[1], addr) and 1 or 0
local version = redis.call('GET', KEYS[7]) or '0'
if ARGV[9] ~= '' and ARGV[9] ~= version then return {'STALE', tonumber(version), here} end

-- Of a stored word only what readers believe is kept: what an operator says
-- must never end as a word that nobody can read.
local word, broken = {}, false
local stored = redis.call('HGET', KEYS[3], addr)
if here == 0 and not stored and ARGV[10] == '1' then return {'ABSENT', tonumber(version) or -1, 0} end
if stored then
  local ok, w = pcall(cjson.decode, stored)
  if not ok or type(w) ~= 'table' then w, broken = {}, true end
  if w.state == 'drain' or w.state == 'maint' then word.state = w.state end
  if type(w.weight) == 'number' and w.weight >= 0 and w.weight <= 256 and w.weight % 1 == 0 then word.weight = w.weight end
  if word.state and type(w.reason) == 'string' then word.reason = w.reason end
  broken = broken or word.state ~= w.state or word.weight ~= w.weight or word.reason ~= w.reason
end
local was = {word.state, word.weight, word.reason}
if verb == 'weight' then
  word.weight = weight
elseif verb == 'ready' then
  word.state, word.reason = nil, nil
else
  word.state, word.reason = verb, nil
  if reason ~= '' then word.reason = reason end
end
if not broken and was[1] == word.state and was[2] == word.weight and was[3] == word.reason then
  return {'SAME', tonumber(version), here}
end

local g, v = bump()
if not g then return v end
if word.state or word.weight then
  word.at = now
  redis.call('HSET', KEYS[3], addr, cjson.encode(word))
else
  redis.call('HDEL', KEYS[3], addr)
end
redis.call('ZADD', KEYS[6], v, addr)
-- An absent address has no other note that would ever drop its place in
-- `changed`.
if here == 0 then redis.call('ZADD', KEYS[5], 'NX', now, addr) end
prune(now)
local what, why = verb == 'drain' and 'drained' or verb, word.reason or ''
if verb == 'weight' then why = weight and string.format('%.0f', weight) or 'own' end
event(now, ARGV[2], addr, what, v, '', why)
return announce(g, v, {'OK', v, here})
