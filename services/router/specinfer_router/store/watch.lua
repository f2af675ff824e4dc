-- Keeps in the index of unattended sessions when their leases end. KEYS: index.
-- ARGV: milliseconds until they end, how long an entry is kept after that, most entries, ids.
-- The index is a hint: a session's own lease decides.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
for position = 4, #ARGV do
    redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[position])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[1] + ARGV[2])
return redis.call('ZCARD', KEYS[1])
