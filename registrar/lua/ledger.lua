#!lua flags=allow-oom
-- Notes where an agent has registrations, or that it has none there any more.
--
-- KEYS  1 the agent's ledger SET: "<service> <addr>"
-- ARGV  1 how long it is kept from now on, ms   2 how many to add   then these, then those to take off
-- Returns how many there are
local n = tonumber(ARGV[2])
if n > 0 then redis.call('SADD', KEYS[1], unpack(ARGV, 3, 2 + n)) end
if #ARGV > 2 + n then redis.call('SREM', KEYS[1], unpack(ARGV, 3 + n)) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return redis.call('SCARD', KEYS[1])
