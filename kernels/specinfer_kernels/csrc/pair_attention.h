// Attention over a block of bfloat16 keys in products of pairs. See attention.h for what a block is.
//
// A word holds two neighbours: of a query or key two dimensions, of values and weights two keys. A
// score is one chain of vdpbf16ps over the pairs of dimensions, a result one over the pairs of keys,
// counted from the block's first place; rows and vectors side by side change no chain. Of a pair that
// a row sees half of, the other value is made zero; pairs that it does not see are left out, and the
// scores of places that it does not see count nowhere. So what stands there cannot reach the row.
#pragma once

#include "linear_tiles.h"

namespace specinfer {

// Words [num_pairs] of one query; an odd last dimension is paired with zero.
inline void load_query_words(const BFloat16* query, int64_t head_dim, uint32_t* words) {
    if (head_dim % 2) words[head_dim / 2] = 0;
    std::memcpy(words, query, size_t(head_dim) * sizeof(BFloat16));
}

// The places of a block at work: offsets of their keys in the cache, -1 where nobody looks.
struct PairPlaces {
    const int64_t* offsets;
    int64_t head_dim;
    int first, last;  // first: a multiple of 16; unseen places up to the next one are zeros
};

}  // namespace specinfer

#if defined(__x86_64__) && defined(__GNUC__)

namespace specinfer {

inline bool pairs_serve() { return multiplies_pairs(); }

// 32 dimensions of a key or value, as far as `lanes` goes; zeros for a place that nobody sees.
SPECINFER_AVX512 inline __m512i load_pairs(const BFloat16* cache, int64_t offset,
                                           __mmask32 lanes) {
    // Even with no lane a load from where no memory is would be slow.
    return _mm512_maskz_loadu_epi16(offset < 0 ? 0 : lanes, cache + std::max<int64_t>(0, offset));
}

SPECINFER_AVX512 inline __mmask32 pair_lanes(int64_t head_dim, int64_t dim) {
    return __mmask32((uint64_t(1) << std::min<int64_t>(32, head_dim - dim)) - 1);
}

// Words [num_pairs][block] of keys.
SPECINFER_AVX512 inline void pack_key_words(const BFloat16* keys, const PairPlaces& at, int block,
                                            uint32_t* words) {
    for (int64_t dim = 0; dim < at.head_dim; dim += 32) {
        const __mmask32 lanes = pair_lanes(at.head_dim, dim);
        const int64_t rows = std::min<int64_t>(16, (at.head_dim - dim + 1) / 2);
        for (int place = at.first; place < at.last; place += 16) {
            Floats square[16];
            uint32_t* to = words + dim / 2 * block + place;
#pragma GCC unroll 16
            for (int key = 0; key < 16; ++key)
                square[key] = (Floats)load_pairs(keys + dim, at.offsets[place + key], lanes);
            transpose(square);
            if (rows == 16) {
#pragma GCC unroll 16
                for (int row = 0; row < 16; ++row)
                    _mm512_storeu_ps(to + row * block, (__m512)square[row]);
            } else {
                for (int64_t row = 0; row < rows; ++row)
                    _mm512_storeu_ps(to + row * block, (__m512)square[row]);
            }
        }
    }
}

// Words [block / 2][padded_dim] of values; padded_dim: a multiple of 16.
SPECINFER_AVX512 inline void pack_value_words(const BFloat16* values, const PairPlaces& at,
                                              int64_t padded_dim, uint32_t* words) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i lows = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)),
                                          _mm512_set1_epi32(0x200000));
    const __m512i highs = _mm512_add_epi32(lows, _mm512_set1_epi32(0x100010));
    for (int64_t dim = 0; dim < at.head_dim; dim += 32) {
        const __mmask32 lanes = pair_lanes(at.head_dim, dim);
        const bool both = dim + 16 < padded_dim;
        for (int place = at.first; place < at.last; place += 2) {
            const __m512i one = load_pairs(values + dim, at.offsets[place], lanes);
            const __m512i other = load_pairs(values + dim, at.offsets[place + 1], lanes);
            uint32_t* to = words + place / 2 * padded_dim + dim;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(one, lows, other));
            if (both)
                _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(one, highs, other));
        }
    }
}

// Keeps 16 weights as bfloat16 and leaves what they are worth. No vector crosses this call: the
// caller may be compiled for narrower ones.
SPECINFER_AVX512 inline void keep_weights(BFloat16* to, float* weights) {
    const __m256i kept = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights));
    _mm256_storeu_si256((__m256i*)to, kept);
    _mm512_storeu_si512(weights, _mm512_slli_epi32(_mm512_cvtepu16_epi32(kept), 16));
}

SPECINFER_AVX512 inline __m512 add_pairs(__m512 sum, uint32_t word, __m512i words) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(word)), (__m512bh)words);
}

// Scores of ROWS queries for VECTORS vectors of 16 places, from words [num_pairs][block].
template <int ROWS, int VECTORS>
SPECINFER_AVX512 void score_pairs(const uint32_t* const* queries, const uint32_t* keys, int block,
                                  int64_t num_pairs, float* const* scores) {
    __m512 sums[ROWS][VECTORS];
    for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < VECTORS; ++part) sums[row][part] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < num_pairs; ++pair, keys += block) {
        __m512i words[VECTORS];
        for (int part = 0; part < VECTORS; ++part)
            words[part] = _mm512_loadu_si512(keys + part * 16);
        for (int row = 0; row < ROWS; ++row)
            for (int part = 0; part < VECTORS; ++part)
                sums[row][part] = add_pairs(sums[row][part], queries[row][pair], words[part]);
    }
    for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < VECTORS; ++part)
            _mm512_storeu_ps(scores[row] + part * 16, sums[row][part]);
}

// Adds one pair of keys, of each word the bits in `seen`, to the sums.
template <int ROWS, int VECTORS>
SPECINFER_AVX512 inline __attribute__((always_inline)) void add_value_pair(
    __m512 (&sums)[ROWS][VECTORS], const uint32_t* const* weights, const uint32_t* values,
    int64_t stride, int pair, uint32_t seen) {
    __m512i words[VECTORS];
    for (int part = 0; part < VECTORS; ++part) {
        words[part] = _mm512_loadu_si512(values + pair * stride + part * 16);
        if (seen != ~0u) words[part] = _mm512_and_si512(words[part], _mm512_set1_epi32(int(seen)));
    }
    for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < VECTORS; ++part)
            sums[row][part] = add_pairs(sums[row][part], weights[row][pair], words[part]);
}

// Adds the weighted values of places [first, last) to VECTORS vectors of ROWS results.
template <int ROWS, int VECTORS>
SPECINFER_AVX512 void add_pair_values(const uint32_t* const* weights, const uint32_t* values,
                                      int64_t stride, int first, int last,
                                      float* const* results) {
    __m512 sums[ROWS][VECTORS];
    for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < VECTORS; ++part)
            sums[row][part] = _mm512_loadu_ps(results[row] + part * 16);
    const uint32_t low = 0xffffu;
    int pair = first / 2;
    if (first % 2 && first < last)
        add_value_pair<ROWS, VECTORS>(sums, weights, values, stride, pair++, ~low);
    for (; pair < last / 2; ++pair)
        add_value_pair<ROWS, VECTORS>(sums, weights, values, stride, pair, ~0u);
    if (last % 2 && pair == last / 2)
        add_value_pair<ROWS, VECTORS>(sums, weights, values, stride, pair, low);
    for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < VECTORS; ++part)
            _mm512_storeu_ps(results[row] + part * 16, sums[row][part]);
}

}  // namespace specinfer

#else

namespace specinfer {

inline bool pairs_serve() { return false; }
inline void pack_key_words(const BFloat16*, const PairPlaces&, int, uint32_t*) {}
inline void pack_value_words(const BFloat16*, const PairPlaces&, int64_t, uint32_t*) {}
inline void keep_weights(BFloat16*, float*) {}
template <int ROWS, int VECTORS>
void score_pairs(const uint32_t* const*, const uint32_t*, int, int64_t, float* const*) {}
template <int ROWS, int VECTORS>
void add_pair_values(const uint32_t* const*, const uint32_t*, int64_t, int, int, float* const*) {}

}  // namespace specinfer

#endif
