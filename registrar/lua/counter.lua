-- Shared by every script that reads a version. A counter that was written by hand may
-- hold anything: what is negative, and what is 2^53 or more, where not each version has
-- a number of its own any more, is no number. A script puts this text where it says
-- "-- counter".
--
-- Returns the number that v, what GET returned, stands for; -1 if it is none
local function counted(v)
  v = v or '0'
  local n = string.match(v, '^[1-9]%d*$') and tonumber(v) or v == '0' and 0 or -1
  return n < 2 ^ 53 and n or -1
end
