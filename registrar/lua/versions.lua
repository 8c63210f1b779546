#!lua flags=no-writes
-- The version counters and the times in force, in one instant.
--
-- KEYS  1 epoch STRING   2 config HASH   3 version STRING   4… service version STRINGs
-- ARGV  1 channel, or nothing: its subscribers do not count
-- Returns {replid, epoch, subscribers of the channel, ttl ms, interval ms, version, service version…}

-- counter

-- times

-- history

local heard = ARGV[1] and redis.pcall('PUBSUB', 'NUMSUB', ARGV[1]) or {}
local out = {
  history(), redis.call('GET', KEYS[1]) or '',
  heard[2] or 0, -- nor do they for whom may not ask
}
local cfg = redis.pcall('HMGET', KEYS[2], 'ttl_ms', 'interval_ms')
out[4], out[5] = 0, 0 -- nobody's trouble here
if not cfg.err then out[4], out[5] = times(cfg[1], cfg[2]) end
for i = 3, #KEYS do
  local v = redis.pcall('GET', KEYS[i])
  out[#out + 1] = type(v) == 'table' and -1 or counted(v)
end
return out
