-- Renews the lease of a session that runs. KEYS: session, tokens.
-- ARGV: owner, holder, lease, time to live (both in milliseconds). Returns 1 when it is renewed.
local found = redis.call('HMGET', KEYS[1], 'finish', 'owner', 'holder')
if found[1] ~= '' or found[2] ~= ARGV[1] or found[3] ~= ARGV[2] then
    return 0
end
local clock = redis.call('TIME')
local lease = string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000) + ARGV[3])
redis.call('HSET', KEYS[1], 'lease', lease)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
