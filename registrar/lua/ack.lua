#!lua
-- A balancer says what it has applied of one service, and that it lives.
-- Balancers that were silent for long are forgotten.
--
-- An id is for one process at a time. The owner of an id is the process that wrote
-- last: "<process> <its first word> <its last word> <when two were seen last>", all
-- unix ms. A process that is new takes the id over at once: its predecessor may have
-- been killed a moment ago. Only one that is alive writes again after that. Once
-- may be a word that was under way; a second time within the time for which a
-- balancer counts as live means that two processes use the id. Then the one that
-- began later writes nothing more but when that was seen, for as long as the
-- other's last word is no older than that.
--
-- KEYS  1 applied HASH of the service   2 balancers ZSET   3 epoch STRING   4 balancer-owners HASH
-- ARGV  1 balancer id   2 service version   3 replid and 4 epoch that the version is of
--       5 forget who was silent for so long, ms   6 now, unix ms, '' = the server's TIME
--       7 live is who was silent for no longer, ms   8 this process
--       9 its first word, unix ms, '' = this one   10 its last word, '' = none
--       11 when it last found another's word after its own, '' = never
-- Returns {1, or 0 if Redis holds another history: nothing of the service is written then,
--   now, 'SOLE', 'FIRST' (two use the id, and this one counts) or 'SECOND' (two use it,
--   and this one has said nothing), 1 if another's word was found after this one's own}
-- history

local now = tonumber(ARGV[6])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local function recent(ms) return math.abs(now - ms) <= tonumber(ARGV[7]) end
local function own(process, first, last, twice)
  redis.call('HSET', KEYS[4], ARGV[1], string.format('%s %.0f %.0f %.0f', process, first, last, twice))
end
-- Reading finds a wrong type before the first write.
local applied, owners = redis.call('HKEYS', KEYS[1]), redis.call('HKEYS', KEYS[4])
local process, first, last, twice = string.match(redis.call('HMGET', KEYS[4], ARGV[1])[1] or '', '^(%S+) (%d+) (%d+) (%d+)$')
first, last, twice = tonumber(first), tonumber(last), tonumber(twice) or 0
local mine, began, contested = ARGV[8], tonumber(ARGV[9]) or now, 0
if process and process ~= mine and ARGV[10] ~= '' and last >= tonumber(ARGV[10]) then
  if not recent(last) then
    twice = 0 -- it stands still: this process takes the id over
  else
    contested = 1
    if ARGV[11] ~= '' and recent(tonumber(ARGV[11])) then
      twice = now
      if first < began or first == began and process < mine then
        own(process, first, last, now)
        return {1, now, 'SECOND', contested}
      end
    end
  end
end
local claim = recent(twice) and 'FIRST' or 'SOLE'
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now - tonumber(ARGV[5])))
for key, ids in pairs({[KEYS[1]] = applied, [KEYS[4]] = owners}) do
  for _, id in ipairs(ids) do
    if not redis.call('ZSCORE', KEYS[2], id) then redis.call('HDEL', key, id) end
  end
end
own(mine, began, now, twice)
if history() ~= ARGV[3] or (redis.call('GET', KEYS[3]) or '') ~= ARGV[4] then return {0, now, claim, contested} end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return {1, now, claim, contested}
