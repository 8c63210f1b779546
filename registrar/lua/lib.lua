-- Shared by every script that changes one service. A script names its shebang
-- and its own arguments; the store puts this text where it says "-- lib".
--
-- KEYS  1 instances ZSET   2 meta HASH      3 admin HASH   4 gone HASH
--       5 gone-at ZSET     6 changed ZSET   7 service version STRING
--       8 services SET     9 version STRING 10 epoch STRING 11 config HASH
--       12 quiet STRING    the last one, after the script's own: events STREAM
-- ARGV  1 channel   2 service   3 now, unix ms, '' = the server's TIME
--       4 text that no other call has: the epoch if there is none   5… the script's own

local function clock()
  if ARGV[3] ~= '' then return tonumber(ARGV[3]) end
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- A script that fails half way is not rolled back, so wrong types are found
-- before the first write: of all keys, or of those whose numbers are given. 13 and 14
-- are admin.lua's and overrides.lua's own.
local function mistyped(which)
  local want = {'zset', 'hash', 'hash', 'hash', 'zset', 'zset', 'string', 'set', 'string', 'string', 'hash', 'string', 'hash', 'zset'}
  for _, i in ipairs(which or {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}) do
    local t, w = redis.call('TYPE', KEYS[i]).ok, want[i]
    if t ~= w and t ~= 'none' then
      return redis.error_reply('WRONGTYPE ' .. KEYS[i] .. ' is a ' .. t .. ', want a ' .. w)
    end
  end
end

-- The reply to an INCR that failed. A value that cannot be counted is this
-- service's trouble alone; a missing right is every service's.
local function uncounted(key, e)
  if string.find(e.err, 'integer') or string.find(e.err, 'overflow') then
    return redis.error_reply('ERR ' .. key .. ' is no counter: ' .. e.err)
  end
  return redis.error_reply(e.err .. ': INCR ' .. key)
end

-- Bumps first: whatever happens after, everybody looks again.
-- Returns both versions, or nil and an error reply.
local function bump()
  local g = redis.pcall('INCR', KEYS[9])
  if type(g) == 'table' then return nil, uncounted(KEYS[9], g) end
  local v = KEYS[7] == KEYS[9] and g or redis.pcall('INCR', KEYS[7]) -- a Cluster's service has one counter
  if type(v) == 'table' then return nil, uncounted(KEYS[7], v) end
  redis.call('SETNX', KEYS[10], ARGV[4])
  return g, v
end

-- Each subscriber costs Redis 8 us, and some 30 more for what it reads then. From
-- 20 on the next announcement keeps a pause of 1/4 ms for each, a sixth of a core,
-- and of half a second at most: who waits for its end has a deadline of one.
local function pause(subscribers)
  return subscribers >= 20 and math.min(math.floor(subscribers / 4), 500) or 0
end

local function publish(g, v)
  local ms = pause(redis.call('PUBLISH', ARGV[1], string.format('%.0f %s %.0f', g, ARGV[2], v)))
  if ms > 0 then redis.pcall('SET', KEYS[12], '', 'PX', ms) end
end

-- Announces, last of all, and returns the reply. In the pause nothing is said; who
-- is the first in it is told {'QUIET', ms} at the reply's end, and calls
-- announce.lua when it is over. Whoever may beat for any service may write to the key, so
-- a pause that is longer than the subscribers are given is none, and who listens among
-- many looks at the counters once a second.
local function announce(g, v, reply)
  local left, most = redis.pcall('PTTL', KEYS[12]), 500
  if type(left) == 'number' and left > 0 then
    local heard = redis.pcall('PUBSUB', 'NUMSUB', ARGV[1])
    if not heard.err then most = pause(heard[2]) end
  end
  if type(left) ~= 'number' or left <= 0 or left > most then
    publish(g, v)
  elseif redis.pcall('GET', KEYS[12]) == '' then
    redis.call('SET', KEYS[12], ARGV[4], 'KEEPTTL')
    reply[#reply + 1] = {'QUIET', left}
  end
  return reply
end

-- event

-- Metadata as a table; an empty one if it is none.
local function decoded(meta)
  local ok, m = pcall(cjson.decode, meta or '')
  return ok and type(m) == 'table' and m or {}
end

local function token_of(addr)
  local id = decoded(redis.call('HGET', KEYS[2], addr)).id
  return type(id) == 'string' and id or ''
end

-- Notes that addr is gone and drops old notes: at most 100, older than 10 min.
-- With a note goes the address's place in `changed`; `pruned` remembers the
-- highest version that went that way.
local function note_gone(addr, reason, token, now, v, why, by)
  redis.call('HSET', KEYS[4], addr, string.format('%s %.0f %s', reason, now, token))
  redis.call('ZADD', KEYS[5], now, addr)
  redis.call('ZADD', KEYS[6], v, addr)
  event(now, ARGV[2], addr, reason == 'operator' and 'deregistered' or reason, v, by or token, why)
end

local function prune(now)
  local old = redis.call('ZRANGEBYSCORE', KEYS[5], '-inf', '(' .. string.format('%.0f', now - 600000), 'LIMIT', 0, 100)
  local pruned = tonumber(redis.call('ZSCORE', KEYS[6], 'pruned') or 0)
  for _, a in ipairs(old) do
    redis.call('HDEL', KEYS[4], a)
    redis.call('ZREM', KEYS[5], a)
    if not redis.call('ZSCORE', KEYS[1], a) then
      local s = redis.call('ZSCORE', KEYS[6], a)
      if s then
        pruned = math.max(pruned, tonumber(s))
        redis.call('ZREM', KEYS[6], a)
      end
    end
  end
  if pruned > 0 and #old > 0 then redis.call('ZADD', KEYS[6], pruned, 'pruned') end
end

-- Takes addr out; more, if not nil, is added to the reason in the log, and by is who did
-- it if the instance itself did not. The caller has bumped and announces.
local function take_out(addr, reason, now, v, more, by)
  local token, why = token_of(addr), ''
  if reason == 'expired' or reason == 'operator' then
    why = string.format('silent for %.0f ms', now - redis.call('ZSCORE', KEYS[1], addr)) .. (more or '')
  end
  redis.call('ZREM', KEYS[1], addr)
  redis.call('HDEL', KEYS[2], addr)
  note_gone(addr, reason, token, now, v, why, by)
end
