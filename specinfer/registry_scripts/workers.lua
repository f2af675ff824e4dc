-- The documents of the workers that are not expired by this server's clock.
-- KEYS: expiries and documents of each tier in turn.
-- ARGV: life in ms, most workers of a tier, most bytes of a document.
-- Answers a list of documents for each tier; what is too large is left out.
local life, most, bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local tiers = {}
for tier = 1, #KEYS / 2 do
  local expiries, documents = KEYS[2 * tier - 1], KEYS[2 * tier]
  local found = {}
  local ids = redis.call('ZRANGEBYSCORE', expiries, '(' .. now, now + life, 'LIMIT', 0, most)
  for _, id in ipairs(ids) do
    if redis.call('HSTRLEN', documents, id) <= bytes then
      found[#found + 1] = redis.call('HGET', documents, id) or ''
    end
  end
  tiers[tier] = found
end
return tiers
