-- Reads a session. KEYS: session, tokens.
-- Returns {facts, epoch, owner, finish reason, tokens}, or {} when there is no such session.
local found = redis.call('HMGET', KEYS[1], 'facts', 'epoch', 'owner', 'finish')
local tokens = redis.call('GET', KEYS[2])
if not found[1] or not tokens then
    return {}
end
return {found[1], found[2], found[3], found[4], tokens}
