#!lua flags=no-writes
-- Reads all that the register knows of one address, in one instant.
--
-- KEYS  1 instances ZSET   2 meta HASH      3 admin HASH   4 gone HASH
--       5 changed ZSET     6 service version STRING   7 epoch STRING   8 config HASH
--       9 bound HASH
-- ARGV  1 addr   2 now, unix ms, '' = the server's TIME
-- Returns {now ms, replid, epoch, version, ttl ms, interval ms,
--   score, meta, admin, gone, version of its last change, bound}, false where there is none

-- counter

-- times

-- history

local now = tonumber(ARGV[2])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local ttl, interval = times(unpack(redis.call('HMGET', KEYS[8], 'ttl_ms', 'interval_ms')))
return {now,
  history(),
  redis.call('GET', KEYS[7]) or '',
  counted(redis.call('GET', KEYS[6])),
  ttl, interval,
  redis.call('ZSCORE', KEYS[1], ARGV[1]), redis.call('HGET', KEYS[2], ARGV[1]), redis.call('HGET', KEYS[3], ARGV[1]),
  redis.call('HGET', KEYS[4], ARGV[1]), redis.call('ZSCORE', KEYS[5], ARGV[1]), redis.call('HGET', KEYS[9], ARGV[1])}
