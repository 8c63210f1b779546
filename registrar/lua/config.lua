#!lua
-- Writes the registry's TTL and heartbeat interval if missing, or anyway.
--
-- KEYS  1 config HASH
-- ARGV  1 ttl, ms   2 interval, ms   3 '1' = overwrite
-- Returns {ttl ms, interval ms} as they stand after the call
if ARGV[3] == '1' then
  redis.call('HSET', KEYS[1], 'ttl_ms', ARGV[1], 'interval_ms', ARGV[2])
else
  redis.call('HSETNX', KEYS[1], 'ttl_ms', ARGV[1])
  redis.call('HSETNX', KEYS[1], 'interval_ms', ARGV[2])
end
return {tonumber(redis.call('HGET', KEYS[1], 'ttl_ms')), tonumber(redis.call('HGET', KEYS[1], 'interval_ms'))}
