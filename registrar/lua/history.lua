-- The id of the data set that answers. '-' where INFO is refused or has no such name:
-- then only epochs and versions tell one history from another.
local function history()
  local info = redis.pcall('INFO', 'replication')
  return type(info) == 'string' and string.match(info, 'master_replid:(%x+)') or '-'
end
