#!lua
-- A balancer says what it has applied of one service, and that it lives.
-- Balancers that were silent for long are forgotten.
--
-- KEYS  1 applied HASH of the service   2 balancers ZSET   3 epoch STRING
-- ARGV  1 balancer id   2 service version   3 replid and 4 epoch that the version is of
--       5 forget who was silent for so long, ms   6 now, unix ms, '' = the server's TIME
-- Returns 1, or 0 if Redis holds another history; nothing of the service is written then
local now = tonumber(ARGV[6])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local applied = redis.call('HKEYS', KEYS[1]) -- finds a wrong type before the first write
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now - tonumber(ARGV[5])))
for _, id in ipairs(applied) do
  if not redis.call('ZSCORE', KEYS[2], id) then redis.call('HDEL', KEYS[1], id) end
end
local replid = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or ''
if replid ~= ARGV[3] or (redis.call('GET', KEYS[3]) or '') ~= ARGV[4] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
