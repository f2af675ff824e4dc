-- Adds the tokens of one round and renews the lease. KEYS: session, tokens.
-- ARGV: epoch expected, tokens, finish reason, time to live, owner, holder, lease.
-- Returns the new epoch, also when the same call did it before; with a finish reason {epoch, '1' if
-- unattended}. Otherwise -1: no such session; -2: another one owns it; -3: cancelled; -4: this is an
-- older state than the caller's; -5: the session is elsewhere.
local found = redis.call('HMGET', KEYS[1], 'epoch', 'finish', 'last', 'owner', 'holder', 'unattended')
if not found[1] then
    return -1
end
local epoch, owner = tonumber(found[1]), tonumber(found[4])
local expected, mine = tonumber(ARGV[1]), tonumber(ARGV[5])
if owner > mine or (owner == mine and found[5] ~= ARGV[6]) then
    return -2
end
if owner < mine then
    return -4
end
local commit = ARGV[3] .. ':' .. ARGV[2]
if epoch ~= expected + 1 or found[3] ~= commit then
    if found[2] == 'cancelled' then
        return -3
    end
    if epoch < expected then
        return -4
    end
    if epoch ~= expected or found[2] ~= '' then
        return -5
    end
    if redis.call('APPEND', KEYS[2], ARGV[2]) == #ARGV[2] then
        -- There was nothing to append to: a session always has tokens.
        redis.call('DEL', KEYS[2])
        return -1
    end
    epoch = epoch + 1
    local clock = redis.call('TIME')
    local lease = string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000) + ARGV[7])
    redis.call('HSET', KEYS[1], 'epoch', string.format('%d', epoch), 'finish', ARGV[3],
        'last', commit, 'lease', lease)
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
    redis.call('PEXPIRE', KEYS[2], ARGV[4])
end
if ARGV[3] ~= '' then
    return {epoch, found[6]}
end
return epoch
