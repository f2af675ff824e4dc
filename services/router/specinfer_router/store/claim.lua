-- Takes a session over. KEYS: session, tokens.
-- ARGV: time to live, holder, lease (milliseconds), '1' for orphans only.
-- Returns {facts, epoch, owner, finish reason, tokens, '1' if unattended}; {} when there is no such
-- session; {milliseconds of lease left} when only an orphan is wanted and it is none, 0 for one that
-- has ended.
local found = redis.call('HMGET', KEYS[1], 'facts', 'epoch', 'finish', 'lease', 'unattended')
local tokens = redis.call('GET', KEYS[2])
if not found[1] or not tokens then
    return {}
end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local finish = found[3]
if ARGV[4] == '1' then
    if finish ~= '' and finish ~= 'abandoned' then
        return {0}
    end
    if tonumber(found[4]) > now then
        return {tonumber(found[4]) - now}
    end
end
if finish == 'abandoned' or finish == 'error' then
    finish = ''
end
local owner = redis.call('HINCRBY', KEYS[1], 'owner', 1)
redis.call('HSET', KEYS[1], 'finish', finish, 'holder', ARGV[2],
    'lease', string.format('%d', now + ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return {found[1], found[2], tostring(owner), finish, tokens, found[5]}
