#!lua
-- A balancer that ends for good, or no longer has a service, is forgotten.
--
-- KEYS  1 applied HASH of the service   2 this balancer's seen HASH   3 balancers ZSET   4 balancer-owners HASH
-- ARGV  1 balancer id   2 this process   3 '1' = it has no other service either
--       4 live is who was silent for no longer, ms   5 now, unix ms, '' = the server's TIME
-- Returns 1, or 0 if another process uses the id: nothing is written then
local now = tonumber(ARGV[5])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
redis.call('ZSCORE', KEYS[3], ARGV[1]) -- finds a wrong type before the first write
local process, last = string.match(redis.call('HMGET', KEYS[4], ARGV[1])[1] or '', '^(%S+) %d+ (%d+) %d+$')
if process and process ~= ARGV[2] and math.abs(now - tonumber(last)) <= tonumber(ARGV[4]) then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('UNLINK', KEYS[2])
if ARGV[3] == '1' then
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('HDEL', KEYS[4], ARGV[1])
end
return 1
