#!lua flags=allow-oom
-- The heartbeat of an instance of which nothing has changed: only its score
-- moves. beat.lua does that too, and everything else, but its eight further keys
-- cost Redis a quarter of a heartbeat (scripts/bench heartbeats).
--
-- KEYS  1 instances ZSET   2 meta HASH   3 config HASH
-- ARGV  1 now, unix ms, '' = the server's TIME   2 addr   3 metadata, JSON with the token as id
--       4 interval, ms, 0 = the registry's
-- Returns {'OK', ttl ms, interval ms}, or {'BEAT'} if beat.lua must decide; nothing
-- written then

-- times

local addr = ARGV[2]
if redis.call('HGET', KEYS[2], addr) ~= ARGV[3] then return {'BEAT'} end
local cfg = redis.call('HMGET', KEYS[3], 'ttl_ms', 'interval_ms')
local ttl, interval = times(cfg[1], cfg[2])
if ARGV[4] * 3 > ttl then return {'BEAT'} end
local now = ARGV[1]
if now == '' then
  -- Text: a number would be written with 17 digits and read again.
  local t = redis.call('TIME')
  local us = t[2]
  now = t[1] .. (#us == 6 and string.sub(us, 1, 3) or string.format('%03d', math.floor(us / 1000)))
end
-- 0 = it is not there, or has this very score.
if redis.call('ZADD', KEYS[1], 'XX', 'CH', now, addr) == 0 then return {'BEAT'} end
return {'OK', ttl, interval}
