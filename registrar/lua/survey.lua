#!lua flags=no-writes
-- Counts, without reading members, what a sweep would find.
--
-- KEYS  instances ZSETs, one a service
-- ARGV  1 now, ms   2 cut-off, ms   3 suspect cut-off, ms
-- Returns for each key five numbers: members, before the cut-off, before the
-- suspect cut-off, after now, and the oldest score ('' if none); members is -1
-- if the key is no ZSET.
local out = {}
for _, k in ipairs(KEYS) do
  local n = redis.pcall('ZCARD', k)
  if type(n) == 'table' then
    for _, x in ipairs({-1, 0, 0, 0, ''}) do out[#out + 1] = x end
  else
    local oldest = redis.call('ZRANGE', k, 0, 0, 'WITHSCORES')[2] or ''
    out[#out + 1] = n
    out[#out + 1] = redis.call('ZCOUNT', k, '-inf', '(' .. ARGV[2])
    out[#out + 1] = redis.call('ZCOUNT', k, '-inf', '(' .. ARGV[3])
    out[#out + 1] = redis.call('ZCOUNT', k, '(' .. ARGV[1], '+inf')
    out[#out + 1] = oldest
  end
end
return out
