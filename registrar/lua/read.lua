#!lua flags=no-writes
-- Reads services: of each what changed since a token, or all of it if the token is
-- another data set's or of one that has no id, if the version is no number (-1), if the index has been pruned past it, or if somebody
-- bumped the version without the index.
--
-- KEYS  1 epoch STRING   2 config HASH, and for each service
--       instances ZSET, meta HASH, admin HASH, gone HASH, changed ZSET, service version STRING, bound HASH
-- ARGV  1 most addresses of a service before all of it is read   2 most entries of one key
--       3 most bytes of one text: of a longer one only its length is returned, after a '#'
--       4 most entries of one key that are read in one call
--       and for each service: replid, epoch, version, '' = read all
-- Returns {now ms, replid, epoch, ttl ms, interval ms, most instances that are served,
--   service…}, of each service
--   {1, version, {addr, score, …}, {addr, meta, …}, {addr, admin, …}, {addr, gone, …}, {addr, bound, …}}: all of it
--   {0, version, {addr…}, {score…}, {meta…}, {admin…}, {gone…}, {bound…}}: what changed, false where there is none
--   {3, version}: all of it, which is more than is read in one call: scan it
--   {2}: one of several that is to be read whole, or that cannot be read: read it alone
-- or an error, of one service alone

-- counter

-- times

-- history

local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local replid = history()
local epoch = redis.call('GET', KEYS[1]) or ''
local cfg = redis.call('HMGET', KEYS[2], 'ttl_ms', 'interval_ms', 'max_instances')
local ttl, interval = times(cfg[1], cfg[2])
-- A limit that is lowered keeps newcomers out, and nobody else.
local served = math.max(math.min(tonumber(string.match(cfg[3] or '', '^%d+$')) or 20000, 100000), 20000)
local out = {now, replid, epoch, ttl, interval, served}
local most, entries, longest, page = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local services = (#KEYS - 2) / 7

-- Whoever can write to Redis can write any amount; a reader must not have to hold it.
local function short(list)
  for i, v in ipairs(list) do
    if v and #v > longest then list[i] = '#' .. #v end
  end
  return list
end

-- What a HASH holds of the members, as HGETALL returns it: overrides of those who are not
-- there are nobody's, and may be any number.
local function of_members(key, members, here)
  if redis.call('HLEN', key) <= 2 * here then return redis.call('HGETALL', key) end
  local out = {}
  for from = 1, #members, 2000 do
    local part = {}
    for i = from, math.min(from + 1998, #members - 1), 2 do part[#part + 1] = members[i] end
    for i, v in ipairs(redis.call('HMGET', key, unpack(part))) do
      if v then out[#out + 1], out[#out + 2] = part[i], v end
    end
  end
  return out
end

-- k and a are how many KEYS and ARGV lie before the service's own.
local function read(k, a)
  local v = counted(redis.call('GET', KEYS[k + 6]))
  local since, here = tonumber(ARGV[a + 3]), redis.call('ZCARD', KEYS[k + 1])
  -- Of more than are served nobody can tell who is beyond but who reads all of it.
  if since and since >= 0 and here <= served and replid ~= '-' and replid == ARGV[a + 1] and epoch == ARGV[a + 2] and v >= since then
    local found = redis.call('ZRANGEBYSCORE', KEYS[k + 5], '(' .. ARGV[a + 3], '+inf', 'WITHSCORES', 'LIMIT', 0, most + 1)
    local changed, top = {}, since
    for i = 1, #found, 2 do
      changed[#changed + 1], top = found[i], tonumber(found[i + 1])
    end
    local whole = #changed <= most and (v == since or top == v)
    for _, addr in ipairs(changed) do
      if addr == 'pruned' then whole = false end
    end
    if whole and #changed == 0 then return {0, v, {}, {}, {}, {}, {}, {}} end
    if whole then
      local r = {0, v, false, redis.call('ZMSCORE', KEYS[k + 1], unpack(changed))}
      for i = 2, 4 do r[3 + i] = short(redis.call('HMGET', KEYS[k + i], unpack(changed))) end
      r[8] = short(redis.call('HMGET', KEYS[k + 7], unpack(changed)))
      r[3] = short(changed)
      return r
    end
  end
  if services > 1 then return {2} end
  local large = false
  for _, i in ipairs({1, 2, 4}) do
    local n = i == 1 and here or redis.call('HLEN', KEYS[k + i])
    -- The dead that a protection holds are beside those who are served.
    local limit = i == 1 and math.min(2 * served, entries) or entries
    if n > limit then
      return redis.error_reply('ERR ' .. KEYS[k + i] .. ' has ' .. n .. ' entries, and no more than ' .. limit .. ' are read')
    end
    large = large or n > page
  end
  if large then return {3, v} end
  local r = {1, v, short(redis.call('ZRANGE', KEYS[k + 1], 0, -1, 'WITHSCORES'))}
  for i = 2, 4, 2 do r[2 + i] = short(redis.call('HGETALL', KEYS[k + i])) end
  r[5], r[7] = short(of_members(KEYS[k + 3], r[3], here)), short(of_members(KEYS[k + 7], r[3], here))
  return r
end

if services == 1 then
  local r = read(2, 4)
  if r.err then return r end
  out[7] = r
  return out
end
for s = 0, services - 1 do
  local ok, r = pcall(read, 2 + 7 * s, 4 + 3 * s)
  out[7 + s] = ok and r or {2}
end
return out
