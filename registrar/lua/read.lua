#!lua flags=no-writes
-- Reads one service: what changed since a token, or all of it if the token is
-- another data set's, if the version is no number (-1), if the index has been pruned past it, or if somebody
-- bumped the version without the index.
--
-- KEYS  1 instances ZSET   2 meta HASH      3 admin HASH   4 gone HASH
--       5 changed ZSET     6 service version STRING   7 epoch STRING   8 config HASH
-- ARGV  1 replid   2 epoch   3 version, '' = read all   4 most addresses before all is read
--       5 most entries of one key   6 most bytes of one text: of a longer one only its
--       length is returned, after a '#'
-- Returns {full 1|0, now ms, replid, epoch, version, ttl ms, interval ms, …}
--   full: {addr, score, …}, {addr, meta, …}, {addr, admin, …}, {addr, gone, …}
--   else: {addr…}, {score…}, {meta…}, {admin…}, {gone…}, false where there is none
-- or an error, if one of the first four keys has more entries and all is to be read
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local replid = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or ''
local epoch = redis.call('GET', KEYS[7]) or ''
local v = tonumber(string.match(redis.call('GET', KEYS[6]) or '0', '^%d+$')) or -1
local cfg = redis.call('HMGET', KEYS[8], 'ttl_ms', 'interval_ms')
local head = {0, now, replid, epoch, v, tonumber(cfg[1] or '') or 15000, tonumber(cfg[2] or '') or 5000}

-- Whoever can write to Redis can write any amount; a reader must not have to hold it.
local longest = tonumber(ARGV[6])
local function short(list)
  for i, v in ipairs(list) do
    if v and #v > longest then list[i] = '#' .. #v end
  end
  return list
end

local since = tonumber(ARGV[3])
if since and since >= 0 and replid == ARGV[1] and epoch == ARGV[2] and v >= since then
  local most = tonumber(ARGV[4])
  local found = redis.call('ZRANGEBYSCORE', KEYS[5], '(' .. ARGV[3], '+inf', 'WITHSCORES', 'LIMIT', 0, most + 1)
  local changed, top = {}, since
  for i = 1, #found, 2 do
    changed[#changed + 1], top = found[i], tonumber(found[i + 1])
  end
  local whole = #changed <= most and (v == since or top == v)
  for _, a in ipairs(changed) do
    if a == 'pruned' then whole = false end
  end
  if whole then
    if #changed == 0 then
      for i = 8, 12 do head[i] = {} end
    else
      head[9] = redis.call('ZMSCORE', KEYS[1], unpack(changed))
      for i = 2, 4 do head[8 + i] = short(redis.call('HMGET', KEYS[i], unpack(changed))) end
      head[8] = short(changed)
    end
    return head
  end
end

for i = 1, 4 do
  local n = i == 1 and redis.call('ZCARD', KEYS[1]) or redis.call('HLEN', KEYS[i])
  if n > tonumber(ARGV[5]) then
    return redis.error_reply('ERR ' .. KEYS[i] .. ' has ' .. n .. ' entries, and no more than ' .. ARGV[5] .. ' are read')
  end
end
head[1] = 1
head[8] = short(redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'))
for i = 2, 4 do head[7 + i] = short(redis.call('HGETALL', KEYS[i])) end
return head
