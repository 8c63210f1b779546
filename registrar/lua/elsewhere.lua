#!lua flags=no-writes
-- Finds the services in which addresses beat now.
--
-- KEYS  instances ZSETs, one a service
-- ARGV  1 the greatest age of a heartbeat, ms   2 now, unix ms, '' = the server's TIME
--       3… addresses
-- Returns pairs: the number of a key, and an address whose score there is no older
local now = tonumber(ARGV[2])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local since, out = now - tonumber(ARGV[1]), {}
for k = 1, #KEYS do
  for i = 3, #ARGV do
    local score = redis.pcall('ZSCORE', KEYS[k], ARGV[i])
    if type(score) == 'table' then break end -- no sorted set: nothing beats there
    if score and tonumber(score) >= since then
      out[#out + 1], out[#out + 2] = k, ARGV[i]
    end
  end
end
return out
