#!lua
-- Ends overrides of one service whose time is over, or whose address nobody has had for
-- long, and sets when the others are to be looked at next. Only reapers do.
--
-- KEYS  1 to 12 as in lib.lua   13 bound HASH   14 override-due ZSET
-- ARGV  1 to 4 as in lib.lua   5 the reaper's id   6 how long nobody may have had the
--       address, ms   7 the longest time between two looks, ms: the notes of who went last
--       longer   8… "a <addr>" or "r <addr>", as in override-due after the service's name
-- Returns {OK, service version, what ended, addr, what ended, addr, …}, without a version
-- if nothing did, and what announce of lib.lua may add
local most, every = tonumber(ARGV[6]), tonumber(ARGV[7])

-- lib

local bad = mistyped() or mistyped({13, 14})
if bad then return bad end
local now = clock()
local function time(n) return type(n) == 'number' and n >= 0 and n or nil end

-- First all is decided, since the versions are bumped before anything else is written.
local writes, ended = {}, {}
for i = 8, #ARGV do
  local mark, addr = string.sub(ARGV[i], 1, 1), string.sub(ARGV[i], 3)
  local key, member = mark == 'r' and KEYS[13] or KEYS[3], ARGV[2] .. ' ' .. ARGV[i]
  local text = redis.call('HGET', key, addr)
  local o = text and decoded(text)
  if not text then
    writes[#writes + 1] = {'ZREM', KEYS[14], member}
  else
    local score = redis.call('ZSCORE', KEYS[14], member)
    -- Who comes and goes between two looks has left a note, if they were not too far apart.
    local seen = score and now - tonumber(score) <= every * 4 / 5
    local here = redis.call('ZSCORE', KEYS[1], addr)
    local at, token = string.match(redis.call('HGET', KEYS[4], addr) or '', '^%a+ (%d+) (.*)$')
    local left = at and now - tonumber(at) <= 2 * every
    if mark == 'r' then
      here = here and token_of(addr) == o.id
      left = left and token == o.id
    end
    local away, over = o.away, {}
    o.away = nil
    if not here and not left then o.away = seen and time(away) or now end
    local said = type(o.by) == 'string' and o.by ~= '' and ' by ' .. o.by or ''
    local function ends(what, till)
      if o[what] and time(o[till]) and o[till] <= now then
        over[#over + 1] = (what == 'weight' and 'weight ' .. tostring(o.weight) or tostring(o.state)) .. said .. ', its time is over'
        o[what], o[till] = nil, nil
        if what == 'state' then o.reason = nil end
      end
    end
    ends('state', 'until')
    ends('weight', 'weight_until')
    if (o.state or o.weight) and o.away and now - o.away >= most then
      local whole = o.state and tostring(o.state) or 'weight ' .. tostring(o.weight)
      over[#over + 1] = whole .. said .. ', nobody has had ' .. (mark == 'r' and 'it' or 'the address') .. ' for long'
      o.state, o.weight = nil, nil
    end
    if not o.state and not o.weight and #over > 0 then
      writes[#writes + 1] = {'HDEL', key, addr}
      writes[#writes + 1] = {'ZREM', KEYS[14], member}
    else
      if #over > 0 or o.away ~= away and (o.state or o.weight) then writes[#writes + 1] = {'HSET', key, addr, cjson.encode(o)} end
      writes[#writes + 1] = {'ZADD', KEYS[14], math.min(time(o['until']) or now + every, time(o.weight_until) or now + every, now + every), member}
    end
    for _, what in ipairs(over) do
      ended[#ended + 1] = {addr, what, here}
    end
  end
end

local g, v
if #ended > 0 then
  g, v = bump()
  if not g then return v end
end
for _, w in ipairs(writes) do redis.call(unpack(w)) end
if #ended == 0 then return {'OK', 0} end
local out = {'OK', v}
for _, e in ipairs(ended) do
  local addr, what, here = unpack(e)
  redis.call('ZADD', KEYS[6], v, addr)
  if not here then redis.call('ZADD', KEYS[5], 'NX', now, addr) end
  event(now, ARGV[2], addr, 'override-ended', v, ARGV[5], what)
  out[#out + 1], out[#out + 2] = what, addr
end
prune(now)
return announce(g, v, out)
