#!lua flags=no-writes
-- Which balancer has applied what of one service.
--
-- KEYS  1 applied HASH   2 balancers ZSET   3 service version STRING   4 epoch STRING   5 balancer-owners HASH
-- ARGV  1 now, unix ms, '' = the server's TIME
-- Returns {now ms, replid, epoch, service version, id, version applied, last seen ms or '',
--   when two processes were last seen to use the id, ms or '', …}

-- counter

-- history

local now = tonumber(ARGV[1])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local out = {now,
  history(),
  redis.call('GET', KEYS[4]) or '',
  counted(redis.call('GET', KEYS[3]))}
local applied = redis.call('HGETALL', KEYS[1])
for i = 1, #applied, 2 do
  out[#out + 1] = applied[i]
  out[#out + 1] = applied[i + 1]
  out[#out + 1] = redis.call('ZSCORE', KEYS[2], applied[i]) or ''
  out[#out + 1] = string.match(redis.call('HMGET', KEYS[5], applied[i])[1] or '', ' (%d+)$') or ''
end
return out
