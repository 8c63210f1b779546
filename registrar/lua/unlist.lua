#!lua
-- Takes the names of services that have no instances off the list. Only reapers do.
--
-- KEYS  1 services SET   2… their instances ZSETs
-- ARGV  their names
-- Returns how many names it took off
local gone = 0
for i, name in ipairs(ARGV) do
  if redis.pcall('ZCARD', KEYS[i + 1]) == 0 then gone = gone + redis.call('SREM', KEYS[1], name) end
end
return gone
