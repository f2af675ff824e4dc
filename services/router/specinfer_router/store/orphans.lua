-- Ids in the index of unattended sessions whose leases have ended. KEYS: index.
-- ARGV: most ids, milliseconds until one that was named is named again: those that cannot be taken
-- over are not to keep the others from their turn.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, session in ipairs(found) do
    redis.call('ZADD', KEYS[1], now + ARGV[2], session)
end
return found
