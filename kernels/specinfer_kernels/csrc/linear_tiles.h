// The innermost loops of the packed product, in the widest registers that the library is built for.
//
// A tile is a few rows, whose sums of one panel stay in registers while steps go by. A step's words
// of weights hold a float32 each, or two bfloat16. Such pairs go through vdpbf16ps where the
// processor has it; else each half is widened, in registers or to words of its own, first the first
// input's and then the second's, and takes a fused multiply-add. Knows words and sums, no tensors and
// no threads.
#pragma once

#include <utility>

#include "vectors.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

// Code that is used where the processor says that it can, whatever the library is built for.
#define SPECINFER_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define SPECINFER_AVX512_VBMI \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")))

namespace specinfer {

// Whether the processor multiplies pairs of bfloat16 with sums in float32.
inline bool multiplies_pairs() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

}  // namespace specinfer

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SPECINFER_TILES 512
#elif defined(__AVX2__) && defined(__FMA__)
#define SPECINFER_TILES 256
#endif

#ifdef SPECINFER_TILES

namespace specinfer {

constexpr int kPanel = 32;  // outputs of a panel

// Every function of a tile has the target, so that all can be inlined into one another. The compiler
// makes nothing of its own from bfloat16 instructions, so the other kinds run without them.
#if SPECINFER_TILES == 512
#define SPECINFER_TILE_TARGET SPECINFER_AVX512
#else
#define SPECINFER_TILE_TARGET
#endif
#define SPECINFER_TILE SPECINFER_TILE_TARGET inline __attribute__((always_inline))

typedef float Lanes __attribute__((vector_size(SPECINFER_TILES / 8)));
typedef uint32_t LaneBits __attribute__((vector_size(SPECINFER_TILES / 8)));
typedef int32_t LaneInts __attribute__((vector_size(SPECINFER_TILES / 8)));

constexpr int kVectorLanes = SPECINFER_TILES / 32;
constexpr int kPanelVectors = kPanel / kVectorLanes;
// Most rows whose sums of a whole panel stay in registers; of more, of half a panel at a time.
constexpr int kWholeRows = SPECINFER_TILES == 512 ? 14 : 2;
constexpr int vectors_at_once(int rows) {
    return rows <= kWholeRows ? kPanelVectors : kPanelVectors / 2;
}

SPECINFER_TILE Lanes fused(float row, Lanes weight, Lanes sum) {
#if SPECINFER_TILES == 512
    return (Lanes)_mm512_fmadd_ps(_mm512_set1_ps(row), (__m512)weight, (__m512)sum);
#else
    return (Lanes)_mm256_fmadd_ps(_mm256_set1_ps(row), (__m256)weight, (__m256)sum);
#endif
}

// Pairs of int8 as whole numbers: the second of a pair above the first.
SPECINFER_TILE LaneInts widen_pairs(const int8_t* from) {
#if SPECINFER_TILES == 512
    return (LaneInts)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)from));
#else
    return (LaneInts)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)from));
#endif
}

// What a kind says: Stored, of rows and outputs; kInputs of a word of weights; kParts, the words of
// a row at a step; kRun, the words of a row that lie side by side; kAlike, whether all tiles have the
// same number of rows; kTileRows, the most rows whose sums the registers hold, which changes no bit;
// Widened, the kind that multiplies weights once they are words.
struct FloatKind {
    typedef float Stored;
    typedef FloatKind Widened;
    static constexpr int kInputs = 1;
    static constexpr int kParts = 1;
    static constexpr int kRun = 1;
    static constexpr bool kAlike = false;
    static constexpr int kTileRows = SPECINFER_TILES == 512 ? kWholeRows : 6;
    SPECINFER_TILE static Lanes part(Lanes words, int) { return words; }
    SPECINFER_TILE static Lanes add(Lanes sum, float row, Lanes weight) {
        return fused(row, weight, sum);
    }
};

#if SPECINFER_TILES == 512
struct PairKind {
    typedef BFloat16 Stored;
    typedef PairKind Widened;
    static constexpr int kInputs = 2;
    static constexpr int kParts = 1;
    static constexpr int kRun = 1;
    static constexpr bool kAlike = false;
    static constexpr int kTileRows = kWholeRows;
    SPECINFER_TILE static Lanes part(Lanes words, int) { return words; }
    SPECINFER_TILE static Lanes add(Lanes sum, float row, Lanes weight) {
        return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(row),
                                       (__m512bh)weight);
    }
};
#endif

struct HalvesKind {
    typedef BFloat16 Stored;
    typedef FloatKind Widened;
    static constexpr int kInputs = 2;
    static constexpr int kParts = 2;
    static constexpr int kRun = 1;
    static constexpr bool kAlike = false;
    static constexpr int kTileRows = SPECINFER_TILES == 512 ? 12 : kWholeRows;
    SPECINFER_TILE static Lanes part(Lanes words, int part) {
        const LaneBits bits = (LaneBits)words;
        return (Lanes)(part ? bits & 0xFFFF0000u : bits << 16);
    }
    SPECINFER_TILE static Lanes add(Lanes sum, float row, Lanes weight) {
        return fused(row, weight, sum);
    }
};

// What a tile fetches meanwhile.
enum Fetch {
    kNothing,
    kAlong,  // the weights that follow its own, two lines a step
    kShare,  // some of the next block, a line a step
};
struct Ahead {
    const char* from;
    int64_t step;  // bytes from one step to the next
};
constexpr int64_t kFetchAhead = 1024;  // bytes, into the nearest cache
constexpr int64_t kFetchFar = 7168;    // bytes beyond those, into the next one

// Adds `steps` steps of some vectors of a panel to the sums [ROWS][kPanel] of a tile, whose words
// are [steps][kParts][ROWS].
template <class Kind, Fetch FETCH, int ROWS>
SPECINFER_TILE void add_vectors(const float* weights, const float* words, float* sums,
                                int64_t steps, bool fresh, Ahead ahead) {
    constexpr int kVectors = vectors_at_once(ROWS);
    constexpr int kLines = FETCH == kAlong ? 2 : FETCH == kShare ? 1 : 0;
    Lanes kept[ROWS][kVectors];
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector) {
            kept[row][vector] = Lanes{};
            if (!fresh)
                std::memcpy(&kept[row][vector], sums + row * kPanel + vector * kVectorLanes,
                            sizeof(Lanes));
        }
#pragma GCC unroll 4
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 2
        for (int line = 0; line < kLines; ++line) {
            _mm_prefetch(ahead.from + 64 * line, _MM_HINT_T0);
            _mm_prefetch(ahead.from + 64 * line + kFetchFar, _MM_HINT_T1);
        }
        if (kLines) ahead.from += ahead.step;
#pragma GCC unroll 2
        for (int part = 0; part < Kind::kParts; ++part) {
            Lanes weight[kVectors];
#pragma GCC unroll 4
            for (int vector = 0; vector < kVectors; ++vector) {
                std::memcpy(&weight[vector], weights + vector * kVectorLanes, sizeof(Lanes));
                weight[vector] = Kind::part(weight[vector], part);
            }
#pragma GCC unroll 14
            for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
                for (int vector = 0; vector < kVectors; ++vector)
                    kept[row][vector] = Kind::add(kept[row][vector], words[row], weight[vector]);
            words += ROWS;
        }
        weights += kPanel;
    }
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector)
            std::memcpy(sums + row * kPanel + vector * kVectorLanes, &kept[row][vector],
                        sizeof(Lanes));
}

// The same of all vectors; those of the second half find what the first fetched along.
template <class Kind, Fetch FETCH, int ROWS>
SPECINFER_TILE_TARGET void add_tile(const float* weights, const float* words, float* sums,
                                    int64_t steps, bool fresh, Ahead ahead) {
    constexpr int kOutputs = vectors_at_once(ROWS) * kVectorLanes;
    constexpr Fetch kAgain = FETCH == kShare ? kShare : kNothing;
    if (kOutputs < kPanel && FETCH == kShare) ahead.step /= 2;
    add_vectors<Kind, FETCH, ROWS>(weights, words, sums, steps, fresh, ahead);
    if (kOutputs == kPanel) return;
    ahead.from += steps * ahead.step;
    add_vectors<Kind, kAgain, ROWS>(weights + kOutputs, words, sums + kOutputs, steps, fresh, ahead);
}

typedef void (*AddTile)(const float*, const float*, float*, int64_t, bool, Ahead);

template <class Kind, Fetch FETCH, int... ROWS>
inline AddTile tile_of(int rows, std::integer_sequence<int, ROWS...>) {
    static constexpr AddTile kTiles[] = {add_tile<Kind, FETCH, ROWS + 1>...};
    return kTiles[rows - 1];
}

// The same for every tile of up to kTileRows rows.
template <class Kind, Fetch FETCH> AddTile tile_of(int64_t rows) {
    return tile_of<Kind, FETCH>(int(rows), std::make_integer_sequence<int, Kind::kTileRows>());
}

// Weights as words of the kind Kind::Widened, [steps][kParts][kPanel]: int8 from -127 to 127, or
// bfloat16.
inline void widen_block(FloatKind, const int8_t* from, int64_t steps, float* to) {
    for (int64_t index = 0; index < steps * kPanel; ++index) to[index] = float(from[index]);
}

SPECINFER_TILE_TARGET inline void widen_block(HalvesKind, const BFloat16* from, int64_t steps,
                                              float* to) {
    for (int64_t step = 0; step < steps; ++step, from += 2 * kPanel, to += 2 * kPanel)
#pragma GCC unroll 4
        for (int output = 0; output < kPanel; output += kVectorLanes) {
            Lanes words;
            std::memcpy(&words, from + 2 * output, sizeof(Lanes));
#pragma GCC unroll 2
            for (int part = 0; part < HalvesKind::kParts; ++part) {
                const Lanes widened = HalvesKind::part(words, part);
                std::memcpy(to + part * kPanel + output, &widened, sizeof(Lanes));
            }
        }
}

SPECINFER_TILE_TARGET inline void widen_block(HalvesKind, const int8_t* from, int64_t steps,
                                              float* to) {
    for (int64_t step = 0; step < steps; ++step, from += 2 * kPanel, to += 2 * kPanel)
#pragma GCC unroll 4
        for (int output = 0; output < kPanel; output += kVectorLanes) {
            const LaneInts pairs = widen_pairs(from + 2 * output);
            const Lanes first = __builtin_convertvector(pairs << 24 >> 24, Lanes);
            const Lanes second = __builtin_convertvector(pairs >> 8, Lanes);
            std::memcpy(to + output, &first, sizeof(Lanes));
            std::memcpy(to + kPanel + output, &second, sizeof(Lanes));
        }
}

#if SPECINFER_TILES == 512

// 16 int8 as float32.
SPECINFER_AVX512 inline __m512 widen_16(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}

SPECINFER_AVX512 inline void convert_block(const int8_t* from, int64_t words, float* to) {
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

inline void widen_block(PairKind, const int8_t* from, int64_t steps, float* to) {
    if (__builtin_cpu_supports("avx512vbmi"))
        look_up_block(from, steps * kPanel, to);
    else
        convert_block(from, steps * kPanel, to);
}

#endif

}  // namespace specinfer

#endif
