#!lua
-- An operator's override of one address, present or not, or of the registration that
-- is there.
--
-- KEYS  1 to 12 as in lib.lua   13 bound HASH: of a registration   14 override-due ZSET
-- ARGV  1 to 4 as in lib.lua   5 addr
--       6 drain | maint | ready | weight   7 weight, '' = the instance's own again   8 reason
--       9 the service version that it must be of, '' = any
--       10 '1' = only of an address that somebody has, or that an override stands for
--       11 by whom   12 for how long, ms, 0 = until somebody ends it
--       13 address | registration, '' = registration where the address is its own
-- Returns {status, service version, 1 if the instance is there, the scope, when it ends,
-- unix ms, 0 = when somebody ends it}, and what announce of lib.lua may add
--   OK    it was written     SAME  it stood already; nothing written
--   STALE the service is of another version; nothing written
--   ABSENT nobody has the address; nothing written
local addr, verb, weight, reason = ARGV[5], ARGV[6], tonumber(ARGV[7]), ARGV[8]
local by, most, scope = ARGV[11], tonumber(ARGV[12]), ARGV[13]

-- lib

local bad = mistyped() or mistyped({13, 14})
if bad then return bad end
local now = clock()
local here = redis.call('ZSCORE', KEYS[1], addr) and 1 or 0
local version = redis.call('GET', KEYS[7]) or '0'
if ARGV[9] ~= '' and ARGV[9] ~= version then return {'STALE', tonumber(version), here, '', 0} end

local meta = here == 1 and decoded(redis.call('HGET', KEYS[2], addr)) or {}
local id = type(meta.id) == 'string' and meta.id or ''
local explicit = scope ~= ''
if not explicit then scope = meta.own == true and id ~= '' and 'registration' or 'address' end

-- Of what is stored only what readers believe is kept: what an operator says must never
-- end as an override that nobody can read.
local function whole(n) return type(n) == 'number' and n % 1 == 0 and n >= 0 end
local function stored(key)
  local text = redis.call('HGET', key, addr)
  if not text then return {}, false, false end
  local ok, w = pcall(cjson.decode, text)
  if not ok or type(w) ~= 'table' then return {}, true, true end
  local o = {at = w.at, by = w.by, id = w.id}
  if w.state == 'drain' or w.state == 'maint' then
    o.state = w.state
    if type(w.reason) == 'string' then o.reason = w.reason end
    if whole(w['until']) then o['until'] = w['until'] end
  end
  if whole(w.weight) and w.weight <= 256 then
    o.weight = w.weight
    if whole(w.weight_until) then o.weight_until = w.weight_until end
  end
  local broken = false
  for _, k in ipairs({'state', 'reason', 'until', 'weight', 'weight_until'}) do broken = broken or o[k] ~= w[k] end
  return o, broken, true
end
local own, broken, there = stored(KEYS[3])
local bound, torn, bounded = stored(KEYS[13])
if bound.id ~= id or id == '' then bound, torn = {}, bounded end -- of one that was there before
local absent = scope == 'registration' and id == '' or ARGV[10] == '1' and here == 0 and not there and not bounded
if absent then return {'ABSENT', tonumber(version) or -1, here, scope, 0} end

-- Sets or clears the state or the weight, and tells whether that is another one now.
local function put(o, value, lasts)
  local what, ends = 'state', 'until'
  if verb == 'weight' then what, ends = 'weight', 'weight_until' end
  local text = value and verb ~= 'weight' and reason ~= '' and reason or nil
  local changed = o[what] ~= value or o[ends] ~= lasts or verb ~= 'weight' and o.reason ~= text
  o[what], o[ends] = value, lasts
  if verb ~= 'weight' then o.reason = text end
  return changed
end
local value = verb
if verb == 'weight' then value = weight end
if verb == 'ready' then value = nil end
local ends = value and most > 0 and now + most or nil
-- What is said of an address is said of whoever is there; and what is ended, of both,
-- unless one was named.
local changed = broken or torn
if scope == 'registration' then
  changed = put(bound, value, ends) or changed
  if not value and not explicit then changed = put(own, nil, nil) or changed end
else
  changed = put(own, value, ends) or changed
  changed = put(bound, nil, nil) or changed
end
if not changed then return {'SAME', tonumber(version), here, scope, ends or 0} end

local g, v = bump()
if not g then return v end
-- A reaper looks at each when it ends, and every five minutes.
local function keep(key, mark, o, written)
  if not (o.state or o.weight) then
    redis.call('HDEL', key, addr)
    redis.call('ZREM', KEYS[14], ARGV[2] .. mark .. addr)
    return
  end
  if written then o.at, o.by = now, by ~= '' and by or nil end
  redis.call('HSET', key, addr, cjson.encode(o))
  redis.call('ZADD', KEYS[14], math.min(o['until'] or now + 300000, o.weight_until or now + 300000, now + 300000), ARGV[2] .. mark .. addr)
end
if scope == 'registration' then bound.id = id end
keep(KEYS[3], ' a ', own, scope == 'address')
keep(KEYS[13], ' r ', bound, scope == 'registration')
redis.call('ZADD', KEYS[6], v, addr)
-- An absent address has no other note that would ever drop its place in
-- `changed`.
if here == 0 then redis.call('ZADD', KEYS[5], 'NX', now, addr) end
prune(now)
local what, why = verb == 'drain' and 'drained' or verb, value and verb ~= 'weight' and reason or ''
if verb == 'weight' then why = weight and string.format('%.0f', weight) or 'own' end
if ends then
  local n, unit = most / 1000, 's'
  for _, larger in ipairs({{60, 'm'}, {60, 'h'}}) do
    if n % larger[1] == 0 then n, unit = n / larger[1], larger[2] else break end
  end
  why = why .. (why ~= '' and ', ' or '') .. string.format('for %.0f%s', n, unit)
end
if scope == 'registration' and value then why = why .. (why ~= '' and ', ' or '') .. 'of this registration' end
event(now, ARGV[2], addr, what, v, by, why)
return announce(g, v, {'OK', v, here, scope, ends or 0})
