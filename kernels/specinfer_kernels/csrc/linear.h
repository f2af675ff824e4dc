// y = x W^T + b of packed weights for few and many rows. See native_linear.py for the packing.
//
// A panel is 32 outputs: at step s two vectors of 16 outputs, each lane a 32-bit word of weights (a
// float32, or two bfloat16 of neighbouring inputs). A row's word of the same step is broadcast, and
// each output is one chain over the steps in order: fused multiply-adds in float32, or vdpbf16ps.
// Nothing else is ever summed, so a row's bits depend on neither the other rows nor the threads.
// Rows lie side by side in registers (a tile), and all tiles take a block of steps of a panel while
// it is in the nearest cache, so memory sees each weight once. int8 weights become words by blocks.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "vectors.h"

namespace specinfer {

enum LinearKind { kFloat = 0, kBFloat16 = 1, kInt8ForFloat = 2, kInt8ForBFloat16 = 3 };

struct LinearWeight {
    const void* panels;
    const float* scale;  // of each output, padded to whole panels; null: 1
    const float* bias;   // likewise; null: 0
    int64_t in_features;
    int64_t out_features;
    int64_t kind;
};

struct LinearRows {
    const void* input;
    void* output;  // [num_rows, out_features]
    int64_t num_rows;
    int64_t row_stride;  // of the input, in elements
};

}  // namespace specinfer

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <omp.h>

// The float32 kinds run nothing of avx512bf16 and are used without it.
#define SPECINFER_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define SPECINFER_AVX512_VBMI \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")))

namespace specinfer {

constexpr int kPanel = 32;              // outputs of a panel
constexpr int kTileRows = 14;           // most rows in registers; changes no bit
constexpr int kLeastRows = 3;           // of a second tile; changes no bit
constexpr int64_t kBlockSteps = 256;    // most steps of a panel between tiles; changes no bit
constexpr int64_t kWidenedSteps = 64;   // the same of int8, whose words share the nearest cache
constexpr int64_t kPassRows = 256;      // most rows for one reading of the weight; changes no bit
constexpr int64_t kChunkBytes = 1 << 17;  // weights that a thread takes at a time
// Where fewer rows share a weight the loads run ahead by themselves, and fetching is in their way;
// those of int8 are too few to run ahead.
constexpr int64_t kFetchRows = 6;
constexpr int64_t kFetchAhead = 1024;   // bytes, into the nearest cache
constexpr int64_t kFetchFar = 7168;     // bytes beyond those, into the next one
constexpr int64_t kSerialLinear = 1 << 20;
constexpr int64_t kOwnWords = 1 << 20;  // most words of all threads' own layouts together

inline bool linear_serves(int64_t kind) {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (kind == kFloat || kind == kInt8ForFloat) return wide;
    return wide && __builtin_cpu_supports("avx512bf16");
}

// What the loops of one thread need to know of a product.
struct LinearPlan {
    LinearWeight weight;
    LinearRows rows;
    int64_t steps, panels, num_tiles, panel_bytes;
    const uint32_t* words;  // rows as words, [tile][step][row of the tile]
    bool alone;             // each thread lays the rows out for itself

    // Of two tiles the first is as large as it can be, so that memory streams for most of the time;
    // fewer than kLeastRows would not fill the multiplier's pipeline.
    int64_t tile_start(int64_t tile) const {
        if (num_tiles == 2 && tile == 1)
            return std::min<int64_t>(kTileRows, rows.num_rows - kLeastRows);
        return rows.num_rows * tile / num_tiles;
    }
};

struct FloatKind {
    typedef float Stored;
    static constexpr int kInputs = 1;  // of a word
    SPECINFER_AVX512 static inline __m512 add(__m512 sum, __m512 row, __m512 weight) {
        return _mm512_fmadd_ps(row, weight, sum);
    }
};

struct BFloat16Kind {
    typedef BFloat16 Stored;
    static constexpr int kInputs = 2;
    SPECINFER_AVX512 static inline __m512 add(__m512 sum, __m512 row, __m512 weight) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(row),
                                (__m512bh)_mm512_castps_si512(weight));
    }
};

// Adds `steps` steps of one panel to the sums [ROWS][kPanel] of a tile. FETCH: and fetches from
// `ahead`, at each step `ahead_step` bytes further.
template <class Kind, bool FETCH, int ROWS>
SPECINFER_AVX512 void add_tile(const float* weights, const float* words, float* sums,
                               int64_t steps, bool fresh, const char* ahead, int64_t ahead_step) {
    __m512 low[ROWS], high[ROWS];
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; ++row) {
        low[row] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * kPanel);
        high[row] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * kPanel + 16);
    }
#pragma GCC unroll 4
    for (int64_t step = 0; step < steps; ++step) {
        if (FETCH) {
            _mm_prefetch(ahead, _MM_HINT_T0);
            _mm_prefetch(ahead + 64, _MM_HINT_T0);
            _mm_prefetch(ahead + kFetchFar, _MM_HINT_T1);
            _mm_prefetch(ahead + kFetchFar + 64, _MM_HINT_T1);
            ahead += ahead_step;
        }
        const __m512 first = _mm512_loadu_ps(weights), second = _mm512_loadu_ps(weights + 16);
#pragma GCC unroll 14
        for (int row = 0; row < ROWS; ++row) {
            const __m512 word = _mm512_set1_ps(words[row]);
            low[row] = Kind::add(low[row], word, first);
            high[row] = Kind::add(high[row], word, second);
        }
        weights += kPanel;
        words += ROWS;
    }
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; ++row) {
        _mm512_storeu_ps(sums + row * kPanel, low[row]);
        _mm512_storeu_ps(sums + row * kPanel + 16, high[row]);
    }
}

typedef void (*AddTile)(const float*, const float*, float*, int64_t, bool, const char*, int64_t);

template <class Kind, bool FETCH, int... ROWS>
inline AddTile tile_of(int rows, std::integer_sequence<int, ROWS...>) {
    static constexpr AddTile kTiles[] = {add_tile<Kind, FETCH, ROWS + 1>...};
    return kTiles[rows - 1];
}

// The same for every tile of up to kTileRows rows.
template <class Kind> AddTile tile_of(int64_t rows, bool fetch) {
    constexpr auto kRows = std::make_integer_sequence<int, kTileRows>();
    return fetch ? tile_of<Kind, true>(int(rows), kRows) : tile_of<Kind, false>(int(rows), kRows);
}

// 16 int8 as float32.
SPECINFER_AVX512 inline __m512 widen_16(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}

SPECINFER_AVX512 inline void widen_block(FloatKind, const int8_t* from, int64_t words, float* to) {
    for (int64_t index = 0; index < words; index += 16)
        _mm512_store_ps(to + index, widen_16(from + index));
}

SPECINFER_AVX512 inline void widen_block(BFloat16Kind, const int8_t* from, int64_t words,
                                         float* to) {
    for (int64_t index = 0; index < words; index += 16)
        _mm512_store_si512(to + index, (__m512i)_mm512_cvtne2ps_pbh(
                                           widen_16(from + 2 * index + 16),
                                           widen_16(from + 2 * index)));
}

// Low and high byte of the bfloat16 of each whole number below 128.
struct MagnitudeTable {
    alignas(64) uint8_t low[128] = {};
    alignas(64) uint8_t high[128] = {};
    constexpr MagnitudeTable() {
        for (int magnitude = 1, power = 0; magnitude < 128; ++magnitude) {
            if (magnitude >> (power + 1)) ++power;
            const int bits = ((127 + power) << 7) | ((magnitude << (7 - power)) & 0x7f);
            low[magnitude] = uint8_t(bits);
            high[magnitude] = uint8_t(bits >> 8);
        }
    }
};

// The same by table, four times as fast: a magnitude of 7 bits picks the two bytes of its bfloat16.
SPECINFER_AVX512_VBMI inline void look_up_block(const int8_t* from, int64_t words, float* to) {
    static constexpr MagnitudeTable kTable;
    const __m512i low_0 = _mm512_load_si512(kTable.low);
    const __m512i low_1 = _mm512_load_si512(kTable.low + 64);
    const __m512i high_0 = _mm512_load_si512(kTable.high);
    const __m512i high_1 = _mm512_load_si512(kTable.high + 64);
    const __m512i sign = _mm512_set1_epi8(-128);
    // Interleaving takes halves of 16-byte lanes, so eights of the first half go to low halves.
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    for (int64_t index = 0; index < words; index += 32) {
        const char* bytes = (const char*)from + 2 * index;
        const __m512i value = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(bytes));
        const __m512i magnitude = _mm512_abs_epi8(value);
        const __m512i first = _mm512_permutex2var_epi8(low_0, magnitude, low_1);
        const __m512i second = _mm512_permutex2var_epi8(high_0, magnitude, high_1);
        const __m512i with_sign = _mm512_ternarylogic_epi64(second, value, sign, 0xf8);  // a|(b&c)
        _mm512_store_si512(to + index, _mm512_unpacklo_epi8(first, with_sign));
        _mm512_store_si512(to + index + 16, _mm512_unpackhi_epi8(first, with_sign));
    }
}

template <class Kind> void widen_int8(const int8_t* from, int64_t steps, float* to) {
    if (Kind::kInputs == 2 && __builtin_cpu_supports("avx512vbmi"))
        look_up_block(from, steps * kPanel, to);
    else
        widen_block(Kind(), from, steps * kPanel, to);
}

SPECINFER_AVX512 inline void store_lanes(float* to, __m512 value, __mmask16 lanes) {
    _mm512_mask_storeu_ps(to, lanes, value);
}

// Round to nearest, ties to even; a NaN stays one. As `narrow`, and unlike vcvtneps2bf16 exact for
// subnormal values.
SPECINFER_AVX512 inline void store_lanes(BFloat16* to, __m512 value, __mmask16 lanes) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_or_epi32(_mm512_add_epi32(bits, half), is_nan, bits,
                                                 _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

template <class Kind>
SPECINFER_AVX512 void store_panel(const LinearPlan& plan, int64_t panel, const float* sums) {
    const int64_t width = plan.weight.out_features;
    for (int64_t column = panel * kPanel; column < std::min(width, (panel + 1) * kPanel);
         column += 16) {
        const __mmask16 lanes = __mmask16((1u << std::min<int64_t>(16, width - column)) - 1);
        auto* to = (typename Kind::Stored*)plan.rows.output + column;
        const float* from = sums + column % kPanel;
        for (int64_t row = 0; row < plan.rows.num_rows; ++row) {
            __m512 value = _mm512_loadu_ps(from + row * kPanel);
            if (plan.weight.scale)
                value = _mm512_mul_ps(value, _mm512_loadu_ps(plan.weight.scale + column));
            if (plan.weight.bias)
                value = _mm512_add_ps(value, _mm512_loadu_ps(plan.weight.bias + column));
            store_lanes(to + row * width, value, lanes);
        }
    }
}

// All rows of the pass through one panel. WIDENED: weights are int8 and go through a block of words.
template <class Kind, bool WIDENED> void run_panel(const LinearPlan& plan, int64_t panel) {
    alignas(64) float sums[kPassRows * kPanel];
    alignas(64) float widened[WIDENED ? kWidenedSteps * kPanel : 1];
    const int64_t step_bytes = plan.panel_bytes / plan.steps;
    const char* source = (const char*)plan.weight.panels + panel * plan.panel_bytes;
    const bool whole = !WIDENED && plan.num_tiles == 1;
    const bool fetch = WIDENED || plan.rows.num_rows >= kFetchRows;
    const int64_t most = whole ? plan.steps : WIDENED ? kWidenedSteps : kBlockSteps;
    for (int64_t start = 0; start < plan.steps; start += most) {
        const int64_t steps = std::min(most, plan.steps - start);
        const char* block = source + start * step_bytes;
        if (WIDENED) widen_int8<Kind>((const int8_t*)block, steps, widened);
        for (int64_t tile = 0; tile < plan.num_tiles; ++tile) {
            const int64_t row = plan.tile_start(tile), rows = plan.tile_start(tile + 1) - row;
            const uint32_t* words = plan.words + row * plan.steps + start * rows;
            const char* ahead = block + kFetchAhead;
            int64_t ahead_step = step_bytes;
            if (WIDENED) {
                // Each tile fetches its part of the next block: memory has the time of all of them.
                ahead_step = step_bytes * rows / plan.rows.num_rows;
                ahead = block + steps * step_bytes;
                ahead += steps * step_bytes * row / plan.rows.num_rows;
            }
            tile_of<Kind>(rows, fetch)(WIDENED ? widened : (const float*)block,
                                       (const float*)words, sums + row * kPanel, steps, start == 0,
                                       ahead, ahead_step);
        }
    }
    store_panel<Kind>(plan, panel, sums);
}

// Words of steps [first, last) of every row, where the tiles want them.
template <class Kind>
void lay_out_rows(const LinearPlan& plan, int64_t first, int64_t last, uint32_t* words) {
    typedef typename Kind::Stored Stored;
    const int64_t whole = plan.weight.in_features / Kind::kInputs;
    for (int64_t tile = 0; tile < plan.num_tiles; ++tile) {
        const int64_t start = plan.tile_start(tile), rows = plan.tile_start(tile + 1) - start;
        uint32_t* to = words + start * plan.steps;
        for (int64_t row = 0; row < rows; ++row) {
            const Stored* from =
                (const Stored*)plan.rows.input + (start + row) * plan.rows.row_stride;
            for (int64_t step = first; step < std::min(last, whole); ++step)
                std::memcpy(to + step * rows + row, from + step * Kind::kInputs, 4);
            if (whole >= first && whole < last) {  // an odd number of inputs: half a word
                uint32_t word = 0;
                std::memcpy(&word, from + whole * Kind::kInputs, sizeof(Stored));
                to[whole * rows + row] = word;
            }
        }
    }
}

// A thread's share of the panels, which others may finish.
struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

// One pass over the weight for at most kPassRows rows.
template <class Kind, bool WIDENED>
void run_pass(LinearPlan plan, uint32_t* words, int threads) {
    std::vector<Share> shares(static_cast<size_t>(threads));
    for (int thread = 0; thread < threads; ++thread) {
        shares[size_t(thread)].next = plan.panels * thread / threads;
        shares[size_t(thread)].end = plan.panels * (thread + 1) / threads;
    }
    const int64_t chunk = std::max<int64_t>(1, kChunkBytes / plan.panel_bytes);
    const int64_t blocks = (plan.steps + kBlockSteps - 1) / kBlockSteps;
    // A single row is its own layout.
    const bool laid_out = plan.rows.num_rows == 1 && plan.weight.in_features % Kind::kInputs == 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        LinearPlan own_plan = plan;
        const int own = omp_get_thread_num();
        uint32_t* own_words = words + (plan.alone ? own * plan.rows.num_rows * plan.steps : 0);
        own_plan.words = laid_out ? (const uint32_t*)plan.rows.input : own_words;
        if (!laid_out && plan.alone) lay_out_rows<Kind>(plan, 0, plan.steps, own_words);
        if (!laid_out && !plan.alone) {
#pragma omp for
            for (int64_t block = 0; block < blocks; ++block)
                lay_out_rows<Kind>(plan, block * kBlockSteps,
                                   std::min(plan.steps, (block + 1) * kBlockSteps), words);
        }
        for (int turn = 0; turn < threads; ++turn) {
            Share& share = shares[size_t((own + turn) % threads)];
            for (int64_t start; (start = share.next.fetch_add(chunk)) < share.end;)
                for (int64_t panel = start; panel < std::min(start + chunk, share.end); ++panel)
                    run_panel<Kind, WIDENED>(own_plan, panel);
        }
    }
}

template <class Kind, bool WIDENED>
void multiply(const LinearWeight& weight, const LinearRows& rows, int64_t num_threads) {
    LinearPlan plan{};
    plan.weight = weight;
    plan.steps = (weight.in_features + Kind::kInputs - 1) / Kind::kInputs;
    plan.panels = (weight.out_features + kPanel - 1) / kPanel;
    plan.panel_bytes = plan.steps * kPanel * (WIDENED ? Kind::kInputs : 4);
    const int64_t work = weight.in_features * weight.out_features * (rows.num_rows + 8);
    const int threads = work < kSerialLinear ? 1 : int(std::min(num_threads, plan.panels));
    const int64_t passes = (rows.num_rows + kPassRows - 1) / kPassRows;
    const int64_t most_rows = (rows.num_rows + passes - 1) / passes;
    // To wait for the others, and to read what they wrote, takes longer than to lay a tile out.
    plan.alone = most_rows <= kTileRows && threads * most_rows * plan.steps <= kOwnWords;
    const int64_t copies = plan.alone ? threads : 1;
    std::unique_ptr<uint32_t[]> words(new uint32_t[size_t(copies * most_rows * plan.steps)]);
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t start = rows.num_rows * pass / passes;
        plan.rows = rows;
        plan.rows.num_rows = rows.num_rows * (pass + 1) / passes - start;
        plan.rows.input = (const typename Kind::Stored*)rows.input + start * rows.row_stride;
        plan.rows.output = (typename Kind::Stored*)rows.output + start * weight.out_features;
        plan.num_tiles = (plan.rows.num_rows + kTileRows - 1) / kTileRows;
        run_pass<Kind, WIDENED>(plan, words.get(), threads);
    }
}

inline bool linear(const LinearWeight& weight, const LinearRows& rows, int64_t num_threads) {
    switch (weight.kind) {
        case kFloat: multiply<FloatKind, false>(weight, rows, num_threads); return true;
        case kBFloat16: multiply<BFloat16Kind, false>(weight, rows, num_threads); return true;
        case kInt8ForFloat: multiply<FloatKind, true>(weight, rows, num_threads); return true;
        case kInt8ForBFloat16: multiply<BFloat16Kind, true>(weight, rows, num_threads); return true;
        default: return false;
    }
}

}  // namespace specinfer

#else

namespace specinfer {

inline bool linear_serves(int64_t) { return false; }
inline bool linear(const LinearWeight&, const LinearRows&, int64_t) { return false; }

}  // namespace specinfer

#endif
