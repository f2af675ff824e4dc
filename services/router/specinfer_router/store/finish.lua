-- Marks a session as finished unless it is. KEYS: session, tokens.
-- ARGV: finish reason, time to live in milliseconds, owner or '' for anybody.
-- A cancellation also replaces a reason that could be resumed.
local facts = redis.call('HMGET', KEYS[1], 'finish', 'owner')
local finish = facts[1]
if not finish or (ARGV[3] ~= '' and facts[2] ~= ARGV[3]) then
    return 0
end
local resumable = finish == 'abandoned' or finish == 'error'
if finish ~= '' and not (resumable and ARGV[1] == 'cancelled') then
    return 0
end
redis.call('HSET', KEYS[1], 'finish', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
