#!lua
-- A reaper's proof that Redis accepts writes. No flag: what refuses a beat
-- (READONLY, MISCONF, NOREPLICAS, OOM) refuses this.
--
-- KEYS  1 this reaper's pulse STRING   2 epoch STRING
--       3… in a Cluster: 1 to 12 of lib.lua and the log, which are not touched
-- ARGV  1 new token   2 epoch to set if there is none   3 expiry, ms   4 now, unix ms, '' = the server's TIME
-- Returns {now ms, master_replid as history of history.lua, epoch before the call or '', previous token or ''}
-- history

local now = tonumber(ARGV[4])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local epoch = redis.call('GET', KEYS[2])
if not epoch then redis.call('SETNX', KEYS[2], ARGV[2]) end
local previous = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return {now, history(), epoch or '', previous or ''}
