#!lua flags=no-writes
-- The version counters, in one instant.
--
-- KEYS  1 epoch STRING   2 version STRING   3… service version STRINGs
-- Returns {replid, epoch, version, service version…}
local out = {string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or '', redis.call('GET', KEYS[1]) or ''}
for i = 2, #KEYS do
  local v = redis.pcall('GET', KEYS[i])
  if type(v) == 'table' then v = -1 end
  out[#out + 1] = tonumber(string.match(v or '0', '^%d+$')) or -1
end
return out
