#!lua flags=allow-oom
-- A reaper says what it does, or that it ends. Also when Redis is out of memory:
-- then the reason why nobody is taken out matters most. Entries of reapers that
-- were silent for long are dropped.
--
-- KEYS  1 reapers HASH
-- ARGV  1 reaper id   2 its state, a JSON object with a field or more, '' = it ends
--       3 forget who was silent for so long, ms   4 now, unix ms, '' = the server's TIME
-- Returns 1
local now = tonumber(ARGV[4])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local at = tonumber(string.match(all[i + 1], '"at":(%d+)'))
  if not at or now - at > tonumber(ARGV[3]) then redis.call('HDEL', KEYS[1], all[i]) end
end
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], string.format('{"at":%.0f,', now) .. string.sub(ARGV[2], 2))
end
return 1
