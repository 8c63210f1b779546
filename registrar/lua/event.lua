-- Shared by every script that writes the log of changes, which is for people and
-- no part of the register: whatever its key holds, and whether or not the caller
-- may write it, the change itself is made. The same fields in the same order each
-- time, so that Redis stores their names once a node. A script puts this text
-- where it says "-- event".
--
-- KEYS  the last one: events STREAM, capped at about 10,000 entries (1 MB)
local function event(now, service, addr, what, version, id, why)
  if service == '_canary' then return end -- it is no service; see Store.Canary
  redis.pcall('XADD', KEYS[#KEYS], 'MAXLEN', '~', 10000, '*', 'at', string.format('%.0f', now), 'service', service,
    'addr', addr, 'what', what, 'version', version, 'id', id, 'why', string.sub(why, 1, 256))
end
