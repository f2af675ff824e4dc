-- Reads what an operator sees of a session. KEYS: session, tokens.
-- Returns {facts, epoch, finish reason, owner, holder, milliseconds of lease left, bytes of tokens,
-- milliseconds to live}, or {} when there is no such session.
local found = redis.call('HMGET', KEYS[1], 'facts', 'epoch', 'finish', 'owner', 'holder', 'lease')
if not found[1] then
    return {}
end
local clock = redis.call('TIME')
local left = tonumber(found[6]) - clock[1] * 1000 - math.floor(clock[2] / 1000)
return {found[1], found[2], found[3], found[4], found[5], math.max(0, left),
    redis.call('STRLEN', KEYS[2]), redis.call('PTTL', KEYS[1])}
