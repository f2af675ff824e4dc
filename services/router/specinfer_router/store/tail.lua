-- Reads the end of a session. KEYS: session, tokens. ARGV: first byte of the tokens wanted.
-- Returns {epoch, finish reason, tokens}, or {} when there is no such session.
local found = redis.call('HMGET', KEYS[1], 'epoch', 'finish')
if not found[1] or redis.call('EXISTS', KEYS[2]) == 0 then
    return {}
end
return {found[1], found[2], redis.call('GETRANGE', KEYS[2], ARGV[1], -1)}
