#!lua
-- Writes the registry's TTL and heartbeat interval if missing, or anyway. Who beats
-- by longer ones learns of shorter ones with its next beat only: as late as the old
-- interval, or a third of the old TTL, allows. Until then its silence says nothing.
-- known_ms notes when that is, less the new interval, which a reaper grants anyway.
--
-- KEYS  1 config HASH   2 services SET, unless it is in another slot
-- ARGV  1 ttl, ms   2 interval, ms   3 '1' = overwrite   4 now, unix ms, '' = the server's TIME
-- Returns {ttl ms, interval ms, known ms or 0, now ms}: as they stand after the call
local now = tonumber(ARGV[4])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local old = redis.call('HMGET', KEYS[1], 'ttl_ms', 'interval_ms')
local write = ARGV[3] == '1' and 'HSET' or 'HSETNX'
if not old[1] or not old[2] or write == 'HSET' and (old[1] ~= ARGV[1] or old[2] ~= ARGV[2]) then
  local slowest = math.max((tonumber(old[1] or '') or 15000) / 3, tonumber(old[2] or '') or 5000)
  -- First of all: no reaper may see shorter times without it.
  if slowest > tonumber(ARGV[2]) and KEYS[2] and redis.call('TYPE', KEYS[2]).ok ~= 'none' then
    redis.call(write, KEYS[1], 'known_ms', string.format('%.0f', math.ceil(now + slowest - ARGV[2])))
  end
  redis.call(write, KEYS[1], 'ttl_ms', ARGV[1])
  redis.call(write, KEYS[1], 'interval_ms', ARGV[2])
end
local cfg = redis.call('HMGET', KEYS[1], 'ttl_ms', 'interval_ms', 'known_ms')
return {tonumber(cfg[1]), tonumber(cfg[2]), tonumber(cfg[3] or '') or 0, now}
