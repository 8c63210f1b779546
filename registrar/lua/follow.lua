#!lua
-- A balancer says which services it follows, in which backends, and that it lives:
-- also of those that nobody has registered as, or of which it could apply nothing.
-- Balancers that were silent for long are forgotten.
--
-- KEYS  1 balancer-follows HASH
-- ARGV  1 balancer id   2 JSON, service → backends, '' = it follows none any more
--       3 forget who was silent for so long, ms   4 now, unix ms, '' = the server's TIME
local now = tonumber(ARGV[4])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local at = tonumber(string.match(all[i + 1], '^%d+'))
  if not at or now - at > tonumber(ARGV[3]) then redis.call('HDEL', KEYS[1], all[i]) end
end
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f %s', now, ARGV[2]))
end
return 1
