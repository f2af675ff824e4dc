// The innermost loop of the packed product by a matrix unit (AMX): a tile of up to 32 rows at once.
//
// The unit has eight registers, each of sixteen rows of 64 bytes. Four hold sums, of the first and
// the last sixteen rows of a tile and both halves of a panel; two the words of the rows, and two those
// of sixteen steps of the weights, which lie in memory as the unit wants them. Of these steps it sums
// the products of first and of second inputs apart, adds both to each other and that to the sum, and
// makes zero of what is subnormal. So a row's sums are its own, and their bits the same however many
// rows are in use. Knows words and sums, no tensors and no threads.
#pragma once

#include "linear_tiles.h"

#if SPECINFER_TILES == 512 && defined(__linux__) && __has_include(<amxtileintrin.h>)
#define SPECINFER_MATRICES

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SPECINFER_AMX \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))

namespace specinfer {

constexpr int kMatrixRows = 16;   // of a register
constexpr int kMatrixSteps = 16;  // at once
constexpr int64_t kMatrixBytes = kMatrixSteps * kPanel * 4;  // of a panel's weights of those steps
constexpr int64_t kLine = 64;  // bytes of a cache's line, as of a register's row

// Asked of the processor, for not every compiler knows the unit's name.
inline bool has_matrix_unit() {
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;  // in edx of leaf 7
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    return (edx & kBFloat16) && (edx & kTiles);
}

// Whether there is such a unit and the system lets this process use it, which it must be asked for.
inline bool multiplies_matrices() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
    static const bool granted = multiplies_pairs() && has_matrix_unit() &&
                                syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
}

struct MatrixKind {
    typedef BFloat16 Stored;
    typedef MatrixKind Widened;
    static constexpr int kInputs = 2;
    static constexpr int kParts = 1;
    static constexpr int kRun = kMatrixSteps;
    static constexpr bool kAlike = true;
    static constexpr int kTileRows = 2 * kMatrixRows;
};

inline void widen_block(MatrixKind, const int8_t* from, int64_t steps, float* to) {
    widen_block(PairKind(), from, steps, to);
}

// Gives a thread's registers the rows that a tile of `rows` needs, for as long as it lives.
class MatrixRegisters {
    struct alignas(64) Configuration {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };

  public:
    SPECINFER_AMX explicit MatrixRegisters(int64_t rows) {
        const int first = int(std::min<int64_t>(rows, kMatrixRows)), second = int(rows) - first;
        const int used[] = {first, first, second, second, first, second, kMatrixRows, kMatrixRows};
        Configuration configuration;
        for (int index = 0; index < 8; ++index) {
            configuration.rows[index] = uint8_t(used[index]);
            configuration.bytes[index] = used[index] ? kLine : 0;
        }
        // What the compiler is told that this reads is less than the whole.
        __asm__ volatile("" : : "r"(&configuration) : "memory");
        _tile_loadconfig(&configuration);
    }
    SPECINFER_AMX ~MatrixRegisters() { _tile_release(); }
    MatrixRegisters(const MatrixRegisters&) = delete;
    MatrixRegisters& operator=(const MatrixRegisters&) = delete;
};

// Lines from memory into the cache behind the nearest one, and those of kNearer bytes before, which
// have come by now, into the nearest one: only few can be on their way to that at once.
constexpr int64_t kNearer = 12288;
inline const char* fetch_lines(const char* from, int64_t lines) {
    for (int64_t line = 0; line < lines; ++line, from += kLine) {
        _mm_prefetch(from, _MM_HINT_T1);
        _mm_prefetch(from - kNearer, _MM_HINT_T0);
    }
    return from;
}

// Adds `times` times sixteen steps to the sums [rows][kPanel] of a tile, whose words are
// [times][rows][16]; BOTH: it has more than sixteen rows. Fetches 4 * `lines` lines at `ahead`
// meanwhile each time, and not at once, for loads would wait for them.
template <bool BOTH>
SPECINFER_AMX void add_matrices(const char* weights, const char* words, int64_t rows, float* sums,
                                int64_t times, bool fresh, const char* ahead, int64_t lines) {
    constexpr int64_t kBetween = kPanel * 4;  // bytes from a step, or a row's sums, to the next
    const char* others = words + kMatrixRows * kLine;
    char* const low = (char*)sums;
    char* const next = low + kMatrixRows * kBetween;
    __asm__ volatile("" : : : "memory");  // loads of registers do not say what they read
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (BOTH) _tile_zero(2);
        if (BOTH) _tile_zero(3);
    } else {
        _tile_loadd(0, low, kBetween);
        _tile_loadd(1, low + kLine, kBetween);
        if (BOTH) _tile_loadd(2, next, kBetween);
        if (BOTH) _tile_loadd(3, next + kLine, kBetween);
    }
    for (int64_t time = 0; time < times; ++time) {
        ahead = fetch_lines(ahead, lines);
        _tile_loadd(4, words, kLine);
        _tile_loadd(6, weights, kBetween);
        ahead = fetch_lines(ahead, lines);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + kLine, kBetween);
        ahead = fetch_lines(ahead, lines);
        _tile_dpbf16ps(1, 4, 7);
        if (BOTH) {
            _tile_loadd(5, others, kLine);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        ahead = fetch_lines(ahead, lines);
        weights += kMatrixBytes;
        words += rows * kLine;
        others += rows * kLine;
    }
    _tile_stored(0, low, kBetween);
    _tile_stored(1, low + kLine, kBetween);
    if (BOTH) _tile_stored(2, next, kBetween);
    if (BOTH) _tile_stored(3, next + kLine, kBetween);
    __asm__ volatile("" : : : "memory");
}

}  // namespace specinfer

#endif
