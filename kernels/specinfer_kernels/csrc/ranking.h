// The largest values of a row and what share of its softmax each has. See token_ranking.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace specinfer {

// Values between two looks at whether any of them is among the largest.
constexpr int64_t kRankBlock = 16 * lanes<float>();

// Sum of exp((value - top) / spread).
inline double sum_of_shares(const float* values, int64_t count, float top, float spread) {
    Floats sum{};
    int64_t place = 0;
    for (; place + lanes<float>() <= count; place += lanes<float>())
        sum += exp_nonpositive((load(values + place) - top) / spread);
    double total = 0;
    for (int lane = 0; lane < lanes<float>(); ++lane) total += double(sum[lane]);
    for (; place < count; ++place) total += double(exp_nonpositive((values[place] - top) / spread));
    return total;
}

// tokens, scores: [wanted], the largest first, of equal ones the lower token; what is not above
// -inf gets -inf.
inline void rank_row(const float* values, int64_t vocab_size, int64_t wanted, float spread,
                     double* tokens, double* scores) {
    const double lowest = -std::numeric_limits<double>::infinity();
    std::fill(tokens, tokens + wanted, 0.0);
    std::fill(scores, scores + wanted, lowest);
    for (int64_t start = 0; start < vocab_size; start += kRankBlock) {
        const int64_t end = std::min(vocab_size, start + kRankBlock);
        if (!(double(largest(values + start, end - start)) > scores[wanted - 1])) continue;
        for (int64_t token = start; token < end; ++token) {
            const double value = double(values[token]);
            if (!(value > scores[wanted - 1])) continue;
            int64_t place = wanted - 1;
            for (; place > 0 && scores[place - 1] < value; --place) {
                scores[place] = scores[place - 1];
                tokens[place] = tokens[place - 1];
            }
            scores[place] = value;
            tokens[place] = double(token);
        }
    }
    if (scores[0] == lowest) return;
    const double top = scores[0];
    const double whole = std::log(sum_of_shares(values, vocab_size, float(top), spread));
    for (int64_t place = 0; place < wanted; ++place)
        scores[place] = double(float((scores[place] - top) / double(spread) - whole));
}

}  // namespace specinfer
