-- Takes a session over. KEYS: session, tokens. ARGV: time to live in milliseconds.
-- Returns {facts, epoch, owner, finish reason, tokens}, or {} when there is no such session.
local facts = redis.call('HMGET', KEYS[1], 'facts', 'epoch', 'finish')
local tokens = redis.call('GET', KEYS[2])
if not facts[1] or not tokens then
    return {}
end
local owner = redis.call('HINCRBY', KEYS[1], 'owner', 1)
local finish = facts[3]
if finish == 'abandoned' or finish == 'error' then
    finish = ''
    redis.call('HSET', KEYS[1], 'finish', '')
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return {facts[1], facts[2], tostring(owner), finish, tokens}
