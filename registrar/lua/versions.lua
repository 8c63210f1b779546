#!lua flags=no-writes
-- The version counters, in one instant.
--
-- KEYS  1 epoch STRING   2 version STRING   3… service version STRINGs
-- ARGV  1 channel, or nothing: its subscribers do not count
-- Returns {replid, epoch, subscribers of the channel, version, service version…}

-- counter

local heard = ARGV[1] and redis.pcall('PUBSUB', 'NUMSUB', ARGV[1]) or {}
local out = {
  string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or '', redis.call('GET', KEYS[1]) or '',
  heard[2] or 0, -- nor do they for whom may not ask
}
for i = 2, #KEYS do
  local v = redis.pcall('GET', KEYS[i])
  out[#out + 1] = type(v) == 'table' and -1 or counted(v)
end
return out
