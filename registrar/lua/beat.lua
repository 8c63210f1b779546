#!lua flags=allow-oom
-- One heartbeat. Arrival, other metadata or another owner is a change; else
-- only the score moves. allow-oom: a full Redis must not make the living look
-- dead.
--
-- KEYS  1 to 12 as in lib.lua
-- ARGV  1 to 4 as in lib.lua
--       5 addr   6 token   7 metadata, JSON with the token as id
--       8 '' = none, else the mark of an agent: it takes over at once what the same agent
--       registered, as the metadata's `agent` says   9 interval, ms, 0 = the registry's
-- Returns {status, now ms, service version, ttl ms, interval ms}; after NEW and TAKEN 1 if
-- operators have an override of the address, else 0; and what announce of lib.lua may add
--   OK        the score moved (service version 0: not read)
--   NEW       it arrived             CHANGED   its metadata changed
--   TAKEN     it took the address over from another token, which has missed its beats
--             or is the same agent's
--   LEFT      this token has left; nothing written
--   NOTOWNER  another token holds the address and beats; when it beat last, ms, in the place
--             of the version; nothing written
--   INTERVAL  the interval is more than a third of the TTL; nothing written
--   INSTANCES, SERVICES  it is new, and there are as many as the registry takes; that
--             number in the place of the version; nothing written
local addr, token, meta, claim = ARGV[5], ARGV[6], ARGV[7], ARGV[8]

-- times

local cfg = redis.call('HMGET', KEYS[11], 'ttl_ms', 'interval_ms', 'max_instances', 'max_services', 'services')
local ttl, interval = times(cfg[1], cfg[2])
local now = tonumber(ARGV[3])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
if tonumber(ARGV[9]) * 3 > ttl then return {'INTERVAL', now, 0, ttl, interval} end

local held = redis.call('HGET', KEYS[2], addr)
local score = redis.call('ZSCORE', KEYS[1], addr)
if score and held == meta then
  redis.call('ZADD', KEYS[1], now, addr)
  return {'OK', now, 0, ttl, interval}
end

-- lib

-- What is read here says so itself when it has a wrong type, and bump of the first
-- that it counts: a newcomer waits for every command.
local bad = mistyped({3, 5, 6, 7, 8, 10})
if bad then return bad end

local gone = redis.call('HGET', KEYS[4], addr)
if gone then
  local reason, by = string.match(gone, '^(%a+) %d+ (.*)$')
  if by == token and (reason == 'left' or reason == 'unhealthy') then return {'LEFT', now, 0, ttl, interval} end
end

local status, holder = 'NEW', ''
if score then
  holder = token_of(addr)
  if holder == token then
    status = 'CHANGED'
  elseif holder == '' or claim ~= '' and decoded(held).agent == claim or now - tonumber(score) > 2 * interval then
    status = 'TAKEN'
  else
    return {'NOTOWNER', now, math.min(now, tonumber(score)), ttl, interval}
  end
elseif ARGV[2] ~= '_canary' then
  -- More than 100,000 nobody reads.
  local function limit(n) return math.min(tonumber(string.match(n or '', '^%d+$')) or 20000, 100000) end
  local here, instances, services = redis.call('ZCARD', KEYS[1]), limit(cfg[3]), limit(cfg[4])
  -- The dead that a protection holds must not keep the living out.
  local full = here >= instances
  if full and here < 2 * instances then
    full = redis.call('ZCOUNT', KEYS[1], string.format('(%.0f', now - ttl), '+inf') >= instances
  end
  if full then return {'INSTANCES', now, instances, ttl, interval} end
  -- Of the names on the list some may be empty: a reaper has counted the others.
  local others = tonumber(cfg[5] or '') or services
  if here == 0 and others >= services and redis.call('SCARD', KEYS[8]) >= services then return {'SERVICES', now, services, ttl, interval} end
end

local g, v = bump()
if not g then return v end
if ARGV[2] ~= '_canary' then redis.call('SADD', KEYS[8], ARGV[2]) end -- it is no service; see Store.Canary
redis.call('HSET', KEYS[2], addr, meta)
redis.call('ZADD', KEYS[1], now, addr)
redis.call('ZADD', KEYS[6], v, addr)
if gone then redis.call('HDEL', KEYS[4], addr) end
redis.call('ZREM', KEYS[5], addr)

local what, why = 'joined', ''
if status == 'TAKEN' then
  what, why = 'takeover', holder ~= '' and 'from ' .. holder or ''
elseif status == 'CHANGED' then
  local before, after = decoded(held), decoded(meta)
  what = after.draining == true and before.draining ~= true and 'draining' or 'changed'
  if before.weight ~= after.weight and type(after.weight) == 'number' then why = 'weight ' .. tostring(after.weight) end
end
event(now, ARGV[2], addr, what, v, token, why)
local reply = {status, now, v, ttl, interval}
if status ~= 'CHANGED' then reply[6] = redis.call('HGET', KEYS[3], addr) and 1 or 0 end
return announce(g, v, reply)
