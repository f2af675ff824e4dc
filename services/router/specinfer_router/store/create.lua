-- Keeps a new session. KEYS: session, tokens. ARGV: facts, tokens, time to live in milliseconds.
-- Returns 1 when it is kept, or was kept by the same call before; 0 when the id is taken.
local facts = redis.call('HMGET', KEYS[1], 'facts', 'epoch')
if facts[1] then
    local same = facts[1] == ARGV[1] and facts[2] == '0' and redis.call('GET', KEYS[2]) == ARGV[2]
    return same and 1 or 0
end
redis.call('HSET', KEYS[1], 'facts', ARGV[1], 'epoch', '0', 'finish', '', 'last', '', 'owner', '0')
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
