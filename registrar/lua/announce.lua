#!lua flags=allow-oom
-- Announces what was changed in a pause between two announcements, when it is over.
--
-- KEYS  1 to 12 as in lib.lua
-- ARGV  1 to 4 as in lib.lua   5 argument 4 of the call that was told of the pause
-- Returns 1, or 0 if that is not to be done: there was an announcement since, and
-- whoever hears it sees that the global version went on by more than one

-- lib

local holds = redis.call('GET', KEYS[12])
if holds and holds ~= ARGV[5] then return 0 end
publish(tonumber(redis.call('GET', KEYS[9]) or 0), tonumber(redis.call('GET', KEYS[7]) or 0))
return 1
