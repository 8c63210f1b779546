#!lua flags=no-writes
-- What balancers have said that they follow.
--
-- KEYS  1 balancer-follows HASH
-- ARGV  1 now, unix ms, '' = the server's TIME
-- Returns {now ms, id, '<ms> <JSON>', …}
local now = tonumber(ARGV[1])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local out = redis.call('HGETALL', KEYS[1])
table.insert(out, 1, now)
return out
