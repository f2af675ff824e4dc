-- Marks a session as finished unless it is, and ends its lease. KEYS: session, tokens.
-- ARGV: finish reason, time to live in milliseconds, owner or '' for anybody, holder.
-- A cancellation also replaces a reason that could be resumed.
-- Returns {1 when that changed something, -1 when there is no such session, '1' if unattended}.
local found = redis.call('HMGET', KEYS[1], 'finish', 'owner', 'holder', 'unattended')
local finish = found[1]
if not finish then
    return {-1, ''}
end
if ARGV[3] ~= '' and (found[2] ~= ARGV[3] or found[3] ~= ARGV[4]) then
    return {0, ''}
end
local resumable = finish == 'abandoned' or finish == 'error'
if finish ~= '' and not (resumable and ARGV[1] == 'cancelled') then
    return {0, ''}
end
redis.call('HSET', KEYS[1], 'finish', ARGV[1], 'lease', '0')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return {1, found[4]}
