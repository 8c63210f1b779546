#!lua flags=allow-oom
-- A reaper says what it does, or that it ends. Also when Redis is out of memory:
-- then the reason why nobody is taken out matters most. Entries of reapers that
-- were silent for long are dropped, and sooner what they held. The log of changes
-- hears when the first of all reapers holds a service, and when none does any
-- more. A log that somebody has ended goes on.
--
-- KEYS  1 reapers HASH   2 events STREAM
-- ARGV  1 reaper id   2 its state, a JSON object with a field or more, '' = it ends
--       3 forget who was silent for so long, ms   4 now, unix ms, '' = the server's TIME
--       5 who was silent for so long, ms, holds nothing
-- Returns 1
local now = tonumber(ARGV[4])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end

-- event

-- Whoever may beat may add to the log, also an entry with the highest id there is, after
-- which there can be none, or with one that Redis' clock will not reach for long. Such
-- entries go, and the last 1,000 before them stay.
local function mend_log()
  local now = redis.call('TIME')[1] * 1000 + 999 -- the clock of the ids
  local info, last = redis.pcall('XINFO', 'STREAM', KEYS[2]), nil
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then last = tonumber(string.match(info[i + 1], '^(%d+)')) end
  end
  if not last or last <= now + 86400000 then return end
  local kept = redis.pcall('XREVRANGE', KEYS[2], string.format('%.0f', now), '-', 'COUNT', 1000)
  if kept.err or type(redis.pcall('DEL', KEYS[2])) == 'table' then return end
  for i = #kept, 1, -1 do redis.pcall('XADD', KEYS[2], kept[i][1], unpack(kept[i][2])) end
end

local function state_of(json)
  local ok, st = pcall(cjson.decode, json)
  return ok and type(st) == 'table' and st or {}
end

-- Adds to set what a reaper of this state holds.
local function note(set, id, st)
  for _, h in ipairs(type(st.held) == 'table' and st.held or {}) do
    if type(h) == 'table' and type(h.service) == 'string' then
      set[h.service] = {id, string.format('%.0f of %.0f look dead', tonumber(h.suspects) or 0, tonumber(h.members) or 0)}
    end
  end
end

local before, after = {}, {}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local id, st = all[i], state_of(all[i + 1])
  local at = tonumber(string.match(all[i + 1], '"at":(%d+)'))
  note(before, id, st)
  if not at or now - at > tonumber(ARGV[3]) then
    redis.call('HDEL', KEYS[1], id)
  elseif id ~= ARGV[1] and now - at > tonumber(ARGV[5]) and st.held then
    st.held = nil
    redis.call('HSET', KEYS[1], id, cjson.encode(st))
  elseif id ~= ARGV[1] then
    note(after, id, st)
  end
end
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  mend_log()
  redis.call('HSET', KEYS[1], ARGV[1], string.format('{"at":%.0f,', now) .. string.sub(ARGV[2], 2))
  note(after, ARGV[1], state_of(ARGV[2]))
end
for svc, h in pairs(before) do
  if not after[svc] then event(now, svc, '', 'released', 0, ARGV[1], '') end
end
for svc, h in pairs(after) do
  if not before[svc] then event(now, svc, '', 'protected', 0, h[1], h[2]) end
end
return 1
