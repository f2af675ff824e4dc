// The ops on their arguments: which status, dtype and number of threads each call gets. What one op
// calls by itself and what a whole decoder calls are these same functions, so their bits agree.
#pragma once

#include "attention.h"
#include "linear.h"
#include "rows.h"

namespace specinfer {

// Multiply-adds below which starting threads costs more than it saves.
constexpr int64_t kSerialWork = 1 << 16;

inline int threads_for(int64_t work, int64_t units, int64_t num_threads) {
    return work < kSerialWork || units < 2 ? 1 : int(num_threads);
}

template <class Run> int with_dtype(int64_t dtype, const Run& run) {
    if (dtype == 0)
        run(Rows<float>{});
    else if (dtype == 1)
        run(Rows<BFloat16>{});
    else
        return kBadDtype;
    return kFine;
}

// Throws std::bad_alloc.
inline int attend_to_trees(const AttentionArguments& a) {
    if (a.num_rows == 0) return kFine;
    int64_t keys = 0;
    const Status status = check_layout(a, &keys);
    if (status != kFine) return status;
    const int64_t work = keys * a.num_heads * a.head_dim;
    const int threads = work < kSerialWork ? 1 : int(a.num_threads);
    if (a.dtype == 0) return attend<float>(a, threads);
    if (a.dtype == 1) return attend<BFloat16>(a, threads);
    if (a.dtype == 2) return attend<double>(a, threads);
    return kBadDtype;
}

inline int norm_rows(const NormArguments& a, int64_t dtype, int64_t num_threads) {
    const int threads = threads_for(a.num_rows * a.width * 8, a.num_rows, num_threads);
    return with_dtype(dtype, [&](auto rows) { rows.norm_rows(a, threads); });
}

inline int gate_rows(const GateArguments& a, int64_t dtype, int64_t num_threads) {
    const int threads = threads_for(a.num_rows * a.width * 8, a.num_rows, num_threads);
    return with_dtype(dtype, [&](auto rows) { rows.gate_rows(a, threads); });
}

inline int check_places(const RotaryArguments& a) {
    if (a.head_dim > kMostHeadDim) return kBadHead;
    for (int64_t row = 0; row < a.num_rows; ++row) {
        if (a.slots[row] < 0 || a.slots[row] >= a.num_slots) return kBadSlot;
        if (a.positions[row] < 0 || a.positions[row] >= a.num_positions) return kBadPosition;
    }
    return kFine;
}

inline int turn_rows(const RotaryArguments& a, int64_t dtype, int64_t num_threads) {
    const int status = check_places(a);
    if (status != kFine) return status;
    const int64_t work = a.num_rows * (a.num_heads + a.num_kv_heads) * a.head_dim * 8;
    const int threads = threads_for(work, a.num_rows, num_threads);
    return with_dtype(dtype, [&](auto rows) { rows.turn_rows(a, threads); });
}

}  // namespace specinfer
