-- Keeps a new session. KEYS: session, tokens.
-- ARGV: facts, tokens, time to live, holder, lease (both in milliseconds), '1' if unattended.
-- Returns 1 when it is kept, or was kept by the same call before; 0 when the id is taken.
local found = redis.call('HMGET', KEYS[1], 'facts', 'epoch', 'holder')
if found[1] then
    local same = found[1] == ARGV[1] and found[2] == '0' and found[3] == ARGV[4]
    return same and redis.call('GET', KEYS[2]) == ARGV[2] and 1 or 0
end
local clock = redis.call('TIME')
local lease = string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000) + ARGV[5])
redis.call('HSET', KEYS[1], 'facts', ARGV[1], 'epoch', '0', 'finish', '', 'last', '', 'owner', '0',
    'holder', ARGV[4], 'lease', lease, 'unattended', ARGV[6])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
