-- Adds the tokens of one round. KEYS: session, tokens.
-- ARGV: epoch expected, tokens, finish reason, time to live in milliseconds, owner.
-- Returns {1, epoch} when added or added by the same call before, {0, epoch} when stale, {-1, 0}
-- when there is no such session, {-2, owner} when another one owns it, {-3, 0} when it was
-- cancelled.
local facts = redis.call('HMGET', KEYS[1], 'epoch', 'finish', 'last', 'owner')
if not facts[1] or redis.call('EXISTS', KEYS[2]) == 0 then
    return {-1, 0}
end
if facts[4] ~= ARGV[5] then
    return {-2, tonumber(facts[4])}
end
local epoch = tonumber(facts[1])
local expected = tonumber(ARGV[1])
local commit = ARGV[3] .. ':' .. ARGV[2]
if epoch == expected + 1 and facts[3] == commit then
    return {1, epoch}
end
if facts[2] == 'cancelled' then
    return {-3, 0}
end
if epoch ~= expected or facts[2] ~= '' then
    return {0, epoch}
end
redis.call('APPEND', KEYS[2], ARGV[2])
redis.call('HSET', KEYS[1], 'epoch', string.format('%d', epoch + 1), 'finish', ARGV[3], 'last', commit)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return {1, epoch + 1}
