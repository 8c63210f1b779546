#!lua
-- Writes the registry's TTL and heartbeat interval if missing, or anyway. Who beats
-- by longer ones learns of shorter ones with its next beat only: as late as the old
-- interval, or a third of the old TTL, allows. So slow_ms says that somebody may
-- still beat that slowly, until a reaper has proven that all had the time to learn.
-- Without slow_ms, or with 0, nobody does; slow_at tells one change from another.
--
-- KEYS  1 config HASH   2 services SET, unless it is in another slot
-- ARGV  1 ttl, ms   2 interval, ms   3 '1' = overwrite   4 now, unix ms, '' = the server's TIME
--       5 the slow_at that is proven, or ''   6 the protocol that a reaper speaks, '' = no reaper
-- Returns {ttl ms, interval ms, slow ms, slow at}, as they are in force after the call

-- times

-- What slow_ms stands for: none can beat more slowly than a third of the longest TTL.
local function slowly(ms)
  ms = tonumber(string.match(ms or '', '^%d+$')) or 0
  return ms <= 28800000 and ms or 0
end

local old = redis.call('HMGET', KEYS[1], 'ttl_ms', 'interval_ms', 'slow_ms', 'slow_at')
local write = ARGV[3] == '1' and 'HSET' or 'HSETNX'
local ttl, interval = times(old[1], old[2])
local slow = slowly(old[3])
if not old[1] or not old[2] or write == 'HSET' and (old[1] ~= ARGV[1] or old[2] ~= ARGV[2]) then
  local slowest = math.max(ttl / 3, interval)
  -- First of all: no reaper may see shorter times without it.
  if slowest > tonumber(ARGV[2]) and KEYS[2] and redis.call('TYPE', KEYS[2]).ok ~= 'none' then
    local now = tonumber(ARGV[4])
    if not now then
      local t = redis.call('TIME')
      now = t[1] * 1000 + math.floor(t[2] / 1000)
    end
    if slow > slowest then slowest = slow end -- from a change before this one
    local put = old[3] and 'HSET' or write
    redis.call(put, KEYS[1], 'slow_ms', string.format('%.0f', math.ceil(slowest)))
    redis.call(put, KEYS[1], 'slow_at', string.format('%.0f', now))
  end
  redis.call(write, KEYS[1], 'ttl_ms', ARGV[1])
  redis.call(write, KEYS[1], 'interval_ms', ARGV[2])
elseif ARGV[5] ~= '' and ARGV[5] == old[4] then
  redis.call('HSET', KEYS[1], 'slow_ms', '0')
end
local speaks = tonumber(ARGV[6])
if speaks and (tonumber(string.match(redis.call('HGET', KEYS[1], 'protocol') or '', '^%d+$')) or 0) < speaks then
  redis.call('HSET', KEYS[1], 'protocol', ARGV[6])
end
local cfg = redis.call('HMGET', KEYS[1], 'ttl_ms', 'interval_ms', 'slow_ms', 'slow_at')
ttl, interval = times(cfg[1], cfg[2])
return {ttl, interval, cfg[4] and slowly(cfg[3]) or 0, cfg[4] or ''}
