-- Marks a session as finished unless it is. KEYS: session, tokens.
-- ARGV: finish reason, time to live in milliseconds.
if redis.call('HGET', KEYS[1], 'finish') ~= '' then
    return 0
end
redis.call('HSET', KEYS[1], 'finish', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
