-- Puts a worker on its tier's list, by this server's clock.
-- KEYS: the tier's expiries (sorted set), its documents (hash).
-- ARGV: worker id, document, life in ms, most workers of a tier.
-- Answers 1, or 0 when the list is full of others.
local life, most = tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function drop(from, to)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], from, to, 'LIMIT', 0, most)) do
    redis.call('ZREM', KEYS[1], id)
    redis.call('HDEL', KEYS[2], id)
  end
end

drop('-inf', now)
-- What could last longer than any life was written before the clock was set back.
drop('(' .. (now + life), '+inf')
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCARD', KEYS[1]) >= most then
  return 0
end
redis.call('ZADD', KEYS[1], now + life, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], 2 * life)
redis.call('PEXPIRE', KEYS[2], 2 * life)
return 1
