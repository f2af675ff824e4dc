// Seeded Gumbel noise and its argmax on a CPU. See seeded_sampling.py for the meaning.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace specinfer {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kPurposeTarget = 1;
constexpr int kWordLanes = lanes<double>();
// Largest noise that can occur: -log(-log(1 - 2^-53)), rounded up.
constexpr double kNoiseLimit = 36.75;

inline uint64_t mix(uint64_t word) { return mix(word - Words{})[0]; }

// Words of tokens first .. first + 7 in the stream of (seed, purpose, position).
struct WordStream {
    uint64_t state;
    WordStream(int64_t seed, int64_t position, uint64_t purpose)
        : state(mix(mix(uint64_t(seed) + kGolden * purpose) ^ uint64_t(position))) {}
    Words at(int64_t first) const {
        Words counter;
        for (int lane = 0; lane < kWordLanes; ++lane) counter[lane] = uint64_t(first + lane + 1);
        return mix(counter * kGolden + state);
    }
};

inline void fill_gumbel(int64_t seed, int64_t position, int64_t vocab_size, double* noise) {
    const WordStream stream(seed, position, kPurposeTarget);
    for (int64_t first = 0; first < vocab_size; first += kWordLanes) {
        const Doubles values = gumbel_from_words(stream.at(first));
        const int64_t count = std::min<int64_t>(kWordLanes, vocab_size - first);
        std::memcpy(noise + first, &values, size_t(count) * sizeof(double));
    }
}

// Index of the first of the largest values; a NaN never wins; 0 where nothing is above -inf.
template <class T> int64_t first_largest(const T* logits, int64_t vocab_size) {
    const T best = largest(logits, vocab_size), lowest = -std::numeric_limits<T>::infinity();
    for (int64_t token = 0; best > lowest && token < vocab_size; ++token)
        if (logits[token] == best) return token;
    return 0;
}

// The least 53-bit uniform whose noise could lift a logit that lies `gap` below the best score:
// noise >= gap needs 1 - u <= -log(u) <= exp(-gap). The slack covers every rounding on the way.
inline uint64_t least_uniform(double gap) {
    if (!(gap > 0)) return 0;
    const double miss = std::exp(-gap) * (1 + 1e-6);
    return miss >= 1 ? 0 : uint64_t((1 - miss) * 0x1p53) & ~uint64_t(3);
}

// Looks at eight tokens; a token whose noise cannot reach the best score costs its hash only.
template <class T>
inline void try_tokens(const WordStream& stream, const T* logits, int64_t first, int64_t count,
                       double* best, int64_t* best_token) {
    const double lowest = -std::numeric_limits<double>::infinity();
    double highest = lowest;
    for (int64_t lane = 0; lane < count; ++lane)
        highest = double(logits[first + lane]) > highest ? double(logits[first + lane]) : highest;
    if (highest == lowest) return;
    const double gap = *best - highest;
    // Beyond this size a difference of scores says too little: look at every token.
    const bool bounded = std::fabs(*best) < 1e6 && std::fabs(highest) < 1e6;
    if (bounded && gap > kNoiseLimit) return;
    const uint64_t least = bounded ? least_uniform(gap) : 0;
    const Words words = stream.at(first);
    const Words reaches = (Words)(((words >> 11) | 1ull) >= (least - Words{}));
    uint64_t any = 0;
    for (int lane = 0; lane < kWordLanes; ++lane) any |= reaches[lane];
    if (!any) return;
    const Doubles noise = gumbel_from_words(words);
    for (int64_t lane = 0; lane < count; ++lane) {
        const double score = double(logits[first + lane]) + noise[lane];
        const bool ahead = score == *best && first + lane < *best_token;
        if (score > *best || (ahead && score > lowest)) {
            *best = score;
            *best_token = first + lane;
        }
    }
}

template <class T>
int64_t sample(const T* logits, int64_t vocab_size, int64_t seed, int64_t position, bool greedy) {
    const int64_t top = first_largest(logits, vocab_size);
    if (greedy) return top;
    const WordStream stream(seed, position, kPurposeTarget);
    double best = -std::numeric_limits<double>::infinity();
    int64_t best_token = 0;
    // The likeliest token first: its score rules most others out.
    try_tokens(stream, logits, top / kWordLanes * kWordLanes,
               std::min<int64_t>(kWordLanes, vocab_size - top / kWordLanes * kWordLanes), &best,
               &best_token);
    for (int64_t first = 0; first < vocab_size; first += kWordLanes)
        try_tokens(stream, logits, first, std::min<int64_t>(kWordLanes, vocab_size - first),
                   &best, &best_token);
    return best_token;
}

template <class T> bool holds_nan(const T* values, int64_t count) {
    typedef typename VectorOf<T>::Type V;
    V sum{};
    int64_t place = 0;
    for (; place + lanes<T>() <= count; place += lanes<T>()) {
        const V value = load(values + place);
        sum += value != value ? splat(T(1)) : V{};
    }
    T found = 0;
    for (int lane = 0; lane < lanes<T>(); ++lane) found += sum[lane];
    for (; place < count; ++place) found += values[place] != values[place] ? T(1) : T(0);
    return found > 0;
}

template <class T>
int64_t draw(const T* law, int64_t vocab_size, int64_t seed, int64_t position, bool greedy) {
    return holds_nan(law, vocab_size) ? -1 : sample(law, vocab_size, seed, position, greedy);
}

}  // namespace specinfer
