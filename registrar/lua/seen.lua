#!lua
-- A balancer says what its HAProxy has of one service: of each address that
-- changed, how many servers are up and how the instances stand, and when it last looked at all of them. It is
-- forgotten with the balancer.
--
-- KEYS  1 this balancer's seen HASH
-- ARGV  1 '1' = forget what was said before   2 age of the look at all, ms
--       3 forget all of it after so long, ms   4 now, unix ms, '' = the server's TIME
--       5 JSON, backend → servers that are up   6 service version that this is not older than, 0 = unknown
--       7 JSON, backend → counts   8… addr, JSON, '' = nothing to say of it any more
-- Returns how many fields there are
local now = tonumber(ARGV[4])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
if ARGV[1] == '1' then redis.call('UNLINK', KEYS[1]) end
redis.call('HSET', KEYS[1], 'at', string.format('%.0f', now - tonumber(ARGV[2])), 'up', ARGV[5], 'version', ARGV[6], 'counts', ARGV[7])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
for i = 8, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    redis.call('HDEL', KEYS[1], ARGV[i])
  else
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return redis.call('HLEN', KEYS[1])
