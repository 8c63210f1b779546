#!lua flags=allow-oom
-- The owner takes its instance out. Absent is no obstacle: the note keeps a
-- late beat of this token from bringing it back.
--
-- KEYS  1 to 12 as in lib.lua
-- ARGV  1 to 4 as in lib.lua   5 addr   6 token   7 reason: left or unhealthy
-- Returns {status, service version}, and what announce of lib.lua may add
--   OK        it is out, or noted as out
--   SAME      this token had left before; nothing written
--   NOTOWNER  another token holds the address, or held it last; nothing written
local addr, token, reason = ARGV[5], ARGV[6], ARGV[7]

-- lib

local bad = mistyped()
if bad then return bad end
local now = clock()

local here = redis.call('ZSCORE', KEYS[1], addr)
if here then
  if token_of(addr) ~= token then return {'NOTOWNER', 0} end
else
  local gone = redis.call('HGET', KEYS[4], addr)
  if gone then
    local was, by = string.match(gone, '^(%a+) %d+ (.*)$')
    -- A note that names no token is nobody's.
    if by and by ~= '' and by ~= token then return {'NOTOWNER', 0} end
    if by == token and (was == 'left' or was == 'unhealthy') then return {'SAME', tonumber(redis.call('GET', KEYS[7]) or 0)} end
  end
end

local g, v = bump()
if not g then return v end
if here then
  take_out(addr, reason, now, v)
else
  note_gone(addr, reason, token, now, v, 'it was not there')
end
prune(now)
return announce(g, v, {'OK', v})
