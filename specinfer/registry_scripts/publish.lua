-- Brings what is known of a worker's blocks from one version to the next.
-- KEYS: the worker's blocks (hash: block hash -> ms since when, and "version").
-- ARGV: version, life in ms, number of added, the added, the removed.
-- Answers 1, or 0 when the version is another one: this server lost what it knew.
local version, num_added = tonumber(ARGV[1]), tonumber(ARGV[3])
if version == 0 then
  redis.call('DEL', KEYS[1])
elseif tonumber(redis.call('HGET', KEYS[1], 'version') or -1) ~= version then
  return 0
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'version', version + 1)
for index = 4, 3 + num_added do
  redis.call('HSET', KEYS[1], ARGV[index], now)
end
for index = 4 + num_added, #ARGV do
  redis.call('HDEL', KEYS[1], ARGV[index])
end
redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[2]))
return 1
