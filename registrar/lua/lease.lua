#!lua flags=allow-oom
-- An agent's lease: of several that would register the same containers, the one
-- that holds it does. It ends by itself when it is not renewed.
--
-- KEYS  1 lease STRING: its holder   2 config HASH; not in a Cluster, where it has another slot
-- ARGV  1 holder   2 what: 'take' = renew it, or take it if it is nobody's; 'keep' = renew it;
--       'end' = give it up   3 most of its length, ms   4 and 5 ttl_ms and interval_ms, without KEYS[2]
-- Returns {1 if it is the holder's after that, else 0; how long it still is somebody's, ms;
-- its length, ms}

-- times

local cfg = KEYS[2] and redis.call('HMGET', KEYS[2], 'ttl_ms', 'interval_ms') or {ARGV[4], ARGV[5]}
local _, interval = times(cfg[1], cfg[2])
-- Half of a heartbeat interval: who follows a killed holder beats before the TTL ends.
local length = math.max(math.min(math.floor(interval / 2), tonumber(ARGV[3])), 1)
local by = redis.call('GET', KEYS[1])
if by == ARGV[1] and ARGV[2] == 'end' then
  redis.call('SET', KEYS[1], by, 'PX', 1)
  return {0, 0, length}
end
if by == ARGV[1] or not by and ARGV[2] == 'take' then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', length)
  return {1, length, length}
end
return {0, math.max(redis.call('PTTL', KEYS[1]), 0), length}
