-- Takes a worker off its tier's list.
-- KEYS: the tier's expiries, its documents. ARGV: worker id.
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
