#!lua flags=no-writes
-- Reads members of one service that beat within the last two intervals, as they are
-- stored.
--
-- KEYS  instances ZSET, meta HASH, admin HASH, bound HASH, config HASH
-- ARGV  1 now, unix ms, '' = the server's TIME   2 addr to leave out   3 most members
--       4 most bytes of one text: of a longer one only its length is returned, after a '#'
-- Returns {now ms, addr, score, meta, admin, bound, addr, …}; meta, admin and bound are
-- '' where there is none

-- times

local now = tonumber(ARGV[1])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local _, interval = times(unpack(redis.call('HMGET', KEYS[5], 'ttl_ms', 'interval_ms')))
local out = {now}
local found = redis.call('ZRANGEBYSCORE', KEYS[1], string.format('%.0f', now - 2 * interval), '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[3])
for i = 1, #found, 2 do
  if found[i] ~= ARGV[2] then
    for _, v in ipairs({found[i], found[i + 1], redis.call('HGET', KEYS[2], found[i]) or '', redis.call('HGET', KEYS[3], found[i]) or '', redis.call('HGET', KEYS[4], found[i]) or ''}) do
      out[#out + 1] = #v > tonumber(ARGV[4]) and '#' .. #v or v
    end
  end
end
return out
