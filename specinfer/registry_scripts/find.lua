-- How many blocks of a chain each worker holds, and since when.
-- KEYS: the workers' blocks. ARGV: the chain's block hashes, from the beginning on.
-- Answers {blocks, ms} for each. A pool gives the end of a chain up before its beginning, so the
-- last block held is found by halving.
local found = {}
for place, key in ipairs(KEYS) do
  local low, high = 0, #ARGV
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if redis.call('HEXISTS', key, ARGV[middle]) == 1 then
      low = middle
    else
      high = middle - 1
    end
  end
  found[place] = {low, low > 0 and redis.call('HGET', key, ARGV[low]) or '0'}
end
return found
