#!lua flags=no-writes
-- Reads the members of one service that beat last, as they are stored.
--
-- KEYS  instances ZSET, meta HASH, admin HASH, bound HASH
-- ARGV  1 most members   2 most bytes of one text: of a longer one only its length is
--       returned, after a '#'
-- Returns {now ms, addr, score, meta, admin, bound, addr, …}, newest first; meta, admin and bound are
-- '' where there is none
local t = redis.call('TIME')
local out = {t[1] * 1000 + math.floor(t[2] / 1000)}
local found = redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1, 'REV', 'WITHSCORES')
for i = 1, #found, 2 do
  for _, v in ipairs({found[i], found[i + 1], redis.call('HGET', KEYS[2], found[i]) or '', redis.call('HGET', KEYS[3], found[i]) or '', redis.call('HGET', KEYS[4], found[i]) or ''}) do
    out[#out + 1] = #v > tonumber(ARGV[2]) and '#' .. #v or v
  end
end
return out
