#!lua flags=no-writes
-- Counts what a sweep would find. Of members it reads only suspects, so that
-- what is no address can be told from them.
--
-- KEYS  instances ZSETs, one a service
-- ARGV  1 now, ms   2 cut-off, ms   3 suspect cut-off, ms, not before the cut-off
--       4 most suspects read
-- Returns for each key six things: members, before the cut-off, before the
-- suspect cut-off, after now, the oldest score ('' if none), and the oldest
-- suspects, oldest first; members is -1 if the key is no ZSET.
local out, room = {}, tonumber(ARGV[4])
for _, k in ipairs(KEYS) do
  local n = redis.pcall('ZCARD', k)
  if type(n) == 'table' then
    for _, x in ipairs({-1, 0, 0, 0, '', {}}) do out[#out + 1] = x end
  else
    local oldest = redis.call('ZRANGE', k, 0, 0, 'WITHSCORES')[2] or ''
    local suspects, read = redis.call('ZCOUNT', k, '-inf', '(' .. ARGV[3]), {}
    if suspects > 0 and room > 0 then
      read = redis.call('ZRANGEBYSCORE', k, '-inf', '(' .. ARGV[3], 'LIMIT', 0, room)
      room = room - #read
    end
    out[#out + 1] = n
    out[#out + 1] = redis.call('ZCOUNT', k, '-inf', '(' .. ARGV[2])
    out[#out + 1] = suspects
    out[#out + 1] = redis.call('ZCOUNT', k, '(' .. ARGV[1], '+inf')
    out[#out + 1] = oldest
    out[#out + 1] = read
  end
end
return out
