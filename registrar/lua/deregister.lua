#!lua
-- An operator takes an instance out. One that beats is refused unless forced:
-- its next beat would bring it back.
--
-- KEYS  1 to 12 as in lib.lua
-- ARGV  1 to 4 as in lib.lua   5 addr   6 '1' = force   7 by whom
-- Returns {status, service version, age of the last beat in ms}, and what announce of lib.lua may add
--   OK      it is out
--   ABSENT  there is no such instance; nothing written
--   BEATS   its last beat is younger than two intervals; nothing written
local addr, force = ARGV[5], ARGV[6] == '1'

-- lib

-- times

local bad = mistyped()
if bad then return bad end
local now = clock()

local score = tonumber(redis.call('ZSCORE', KEYS[1], addr) or '')
if not score then return {'ABSENT', 0, 0} end
local _, interval = times(unpack(redis.call('HMGET', KEYS[11], 'ttl_ms', 'interval_ms')))
if not force and now - score <= 2 * interval then return {'BEATS', 0, math.max(now - score, 0)} end

local g, v = bump()
if not g then return v end
take_out(addr, 'operator', now, v, nil, ARGV[7])
prune(now)
return announce(g, v, {'OK', v, now - score})
