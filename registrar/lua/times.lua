-- Shared by every script that follows the registry's times. They may have been written
-- by hand: what is out of bounds is as if it were not there. A script puts this text
-- where it says "-- times".
--
-- Returns the TTL in force, 300 ms to a day, and the heartbeat interval, 100 ms to a
-- third of it, for what the config HASH holds as ttl_ms and interval_ms
local function times(ttl, interval)
  ttl = tonumber(string.match(ttl or '', '^%d+$'))
  if not ttl or ttl < 300 or ttl > 86400000 then ttl = 15000 end
  interval = tonumber(string.match(interval or '', '^%d+$'))
  if not interval or interval < 100 or interval * 3 > ttl then interval = math.min(5000, math.floor(ttl / 3)) end
  return ttl, interval
end
