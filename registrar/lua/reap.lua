#!lua
-- Takes out instances of one service whose last beat is older than the
-- cut-off. No flag: a Redis that would refuse a beat must refuse this too.
--
-- KEYS  1 to 12 as in lib.lua   13 this reaper's pulse STRING   14 let-go STRING
-- ARGV  1 to 4 as in lib.lua
--       5 token of the last pulse   6 time of the last pulse, ms   7 its greatest age, ms
--       8 cut-off, ms: out is who beat before it, not at it   9 most addresses a call
--       10 let go, ms: above 0, only one is out, the oldest beside which one of the
--          instances from ARGV[12] on stays, and none of any service within so long after
--          the one before. -1: out are only those that are named, whatever holds them
--       11 replid that the last pulse saw   12… with let go: instances of the service;
--          with -1: an address and the service that beats at it, an address…
-- Returns {status, service version, stale ones left, addr…}, and what announce of lib.lua may add
--   OK      each addr is out by this very call
--   FENCED  Redis does not hold the pulse: other data, or it expired; or it holds
--           it under another replid: a snapshot or a replica that has the pulse need
--           not have the beats after it. Nothing written
--   LATE    the pulse is too old or in the future; nothing written
--   LAST    none of the instances given would stay, so nobody is let go
local token, last, most, cut = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]

-- lib

-- history

local now = clock()
if redis.call('GET', KEYS[13]) ~= token then return {'FENCED', 0, 0} end
if history() ~= ARGV[11] then return {'FENCED', 0, 0} end
if now < last or now - last > most then return {'LATE', 0, 0} end
local bad = mistyped()
if bad then return bad end

-- A score from the future would live for ever. It is no change: the member is
-- where it was.
for _, a in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. string.format('%.0f', now), '+inf', 'LIMIT', 0, 1000)) do
  redis.call('ZADD', KEYS[1], 'XX', now, a)
end

local stale = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. cut, 'LIMIT', 0, ARGV[9])
if #stale == 0 then return {'OK', 0, 0} end
local pace, other = tonumber(ARGV[10]), {}
if pace < 0 then
  stale = {}
  for i = 12, #ARGV, 2 do
    local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
    if score and tonumber(score) < tonumber(cut) then
      stale[#stale + 1], other[ARGV[i]] = ARGV[i], ARGV[i + 1]
    end
  end
  if #stale == 0 then return {'OK', 0, redis.call('ZCOUNT', KEYS[1], '-inf', '(' .. cut)} end
elseif pace > 0 then
  local left = redis.call('ZCOUNT', KEYS[1], '-inf', '(' .. cut)
  local function stays_without(a)
    for i = 12, #ARGV do
      if ARGV[i] ~= a and redis.call('ZSCORE', KEYS[1], ARGV[i]) then return true end
    end
  end
  local goes
  for _, a in ipairs(stale) do
    if stays_without(a) then
      goes = a
      break
    end
  end
  if not goes then return {'LAST', 0, left} end
  if not redis.call('SET', KEYS[14], token, 'NX', 'PX', pace) then return {'OK', 0, left} end
  stale = {goes}
end
local g, v = bump()
if not g then return v end
for _, a in ipairs(stale) do take_out(a, 'expired', now, v, other[a] and '; ' .. other[a] .. ' beats at its address') end
prune(now)
if redis.call('ZCARD', KEYS[1]) == 0 then redis.call('SREM', KEYS[8], ARGV[2]) end
return announce(g, v, {'OK', v, redis.call('ZCOUNT', KEYS[1], '-inf', '(' .. cut), unpack(stale)})
