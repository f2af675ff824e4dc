-- Puts a session back that was lost, or of which only an older state is left. KEYS: session, tokens.
-- ARGV: facts, tokens, time to live, holder, lease, '1' if unattended, owner, owner number that was
-- given out here last, epoch, finish reason.
-- Returns 1 when it is put back, 0 when what is here is as good, -2 when another one has claimed it
-- since, -3 when it was cancelled.
local found = redis.call('HMGET', KEYS[1], 'epoch', 'finish', 'owner', 'holder')
local owner, known = tonumber(ARGV[7]), tonumber(ARGV[8])
local clock = redis.call('TIME')
local lease = string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000) + ARGV[5])
if ARGV[10] ~= '' then
    lease = '0'
end
if found[1] then
    local here = tonumber(found[3])
    local ours = found[4] == ARGV[4]
    if (here > known and not (here == owner and ours)) or (here == known and not ours) then
        return -2
    end
    if found[2] == 'cancelled' and ARGV[10] ~= 'cancelled' then
        return -3
    end
    local epoch = tonumber(found[1])
    if here == owner and epoch >= tonumber(ARGV[9]) and redis.call('EXISTS', KEYS[2]) == 1 then
        if epoch == tonumber(ARGV[9]) and found[2] == '' then
            redis.call('HSET', KEYS[1], 'finish', ARGV[10], 'lease', lease)
        end
        return 0
    end
end
redis.call('HSET', KEYS[1], 'facts', ARGV[1], 'epoch', ARGV[9], 'finish', ARGV[10], 'last', '',
    'owner', ARGV[7], 'holder', ARGV[4], 'lease', lease, 'unattended', ARGV[6])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
