#!lua flags=allow-oom
-- The heartbeats of many instances of which nothing has changed: what still.lua
-- does, once for all. One service's trouble is no other's.
--
-- KEYS  1 config HASH   then of each service: instances ZSET, meta HASH
-- ARGV  1 now, unix ms, '' = the server's TIME   2 longest interval, ms, 0 = the registry's
--       then of each service: how many, their addrs, and their metadata as in still.lua
-- Returns {ttl ms, interval ms, n…}: beat.lua must decide about the n-th; nothing
-- of it is written then

-- times

local cfg = redis.call('HMGET', KEYS[1], 'ttl_ms', 'interval_ms')
local ttl, interval = times(cfg[1], cfg[2])
local accepted = ARGV[2] * 3 <= ttl
local now = ARGV[1]
if now == '' then
  -- Text, as in still.lua.
  local t = redis.call('TIME')
  local us = t[2]
  now = t[1] .. (#us == 6 and string.sub(us, 1, 3) or string.format('%03d', math.floor(us / 1000)))
end
local out, o = {ttl, interval}, 2
local at, nth = 3, 0 -- ARGV of this service's count, and the beats before
for k = 2, #KEYS, 2 do
  local n = tonumber(ARGV[at])
  local held = accepted and redis.pcall('HMGET', KEYS[k + 1], unpack(ARGV, at + 1, at + n)) or {}
  local same, s = {}, 0 -- score, addr, score, addr…
  for i = 1, n do
    if held[i] == ARGV[at + n + i] then -- with an error no held[i] is there
      same[s + 1], same[s + 2] = now, ARGV[at + i]
      s = s + 2
    else
      o = o + 1
      out[o] = nth + i
    end
  end
  if s > 0 then
    local moved = redis.pcall('ZADD', KEYS[k], 'XX', 'CH', unpack(same))
    -- Who did not move is not there, or has this very score.
    if type(moved) == 'table' or moved * 2 < s then
      for i = 1, n do
        if held[i] == ARGV[at + n + i] and (type(moved) == 'table' or not redis.call('ZSCORE', KEYS[k], ARGV[at + i])) then
          o = o + 1
          out[o] = nth + i
        end
      end
    end
  end
  at, nth = at + 1 + 2 * n, nth + n
end
return out
