#!lua
-- Has overrides that no index names, as somebody may have written them by hand, looked at
-- by reapers too. Only reapers do.
--
-- KEYS  1 override-due ZSET   2… an admin HASH and a bound HASH for each service
-- ARGV  1 when they are looked at, unix ms   2… the services
-- Returns how many are new
local new = 0
for s = 2, #ARGV do
  for i, mark in ipairs({' a ', ' r '}) do
    local addrs = redis.pcall('HKEYS', KEYS[2 * s - 3 + i])
    if not addrs.err then
      for _, addr in ipairs(addrs) do
        new = new + redis.call('ZADD', KEYS[1], 'NX', ARGV[1], ARGV[s] .. mark .. addr)
      end
    end
  end
end
return new
