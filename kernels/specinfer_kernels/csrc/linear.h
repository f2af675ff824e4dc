// y = x W^T + b of packed weights for few and many rows. See native_linear.py for the packing.
//
// A panel is 32 outputs: at step s it has one 32-bit word of weights of each (a float32, or two
// bfloat16 of neighbouring inputs). Each output is one chain over the steps in order, see
// linear_tiles.h, or what a matrix unit makes of them, see linear_matrices.h. Nothing else is ever
// summed, so a row's bits depend on neither the other rows nor the threads. Rows lie side by side
// in registers (a tile), and all tiles take a block of steps of a panel while it is in a near cache,
// so memory sees each weight once. int8 weights become words by blocks, and so do halves of words
// where each of several tiles would widen them again.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "linear_matrices.h"
#include "linear_plan.h"
#include "linear_tiles.h"

#ifdef SPECINFER_TILES

#include <omp.h>

namespace specinfer {

// None of these changes a bit. Up to kWaitingRows memory is waited for, and tiles pass over a panel
// once; words are widened beforehand for more rows than kWideningRows.
constexpr int64_t kWaitingRows = SPECINFER_TILES == 512 ? 0 : 5;
constexpr int64_t kWideningRows = SPECINFER_TILES == 512 ? 24 : kWholeRows;
constexpr int64_t kBlockSteps = SPECINFER_TILES == 512 ? 256 : 128;  // most between tiles
constexpr int64_t kWidenedSteps = 64;     // the same of words that were widened, which are larger
constexpr int64_t kPassRows = 256;        // most rows for one reading of the weight
constexpr int64_t kChunkBytes = 1 << 17;  // weights that a thread takes at a time
// Where fewer rows share a weight the loads run ahead by themselves, and fetching is in their way;
// those of words that were widened are too few to run ahead.
constexpr int64_t kFetchRows = 6;
constexpr int64_t kMatrixBlockSteps = 128;  // of the matrix unit, instead of kBlockSteps
constexpr int64_t kFetchMatrices = 16384;   // bytes that it fetches ahead
constexpr int64_t kSerialLinear = 1 << 20;
// Most rows that a thread lays out for itself; for the unit they are whole lines to copy.
template <class Kind> constexpr int64_t kAloneRows = Kind::kAlike ? Kind::kTileRows : 14;
constexpr int64_t kOwnWords = 1 << 20;  // most words of all threads' own layouts together

inline bool linear_serves(int64_t kind) { return kind >= kFloat && kind <= kInt8ForBFloat16; }

template <class Kind>
void store_tile(const LinearPlan& plan, const LinearPlan::Tile& tile, int64_t panel,
                const float* sums) {
    const int64_t width = plan.weight.out_features;
    for (int64_t column = panel * kPanel; column < std::min(width, (panel + 1) * kPanel);
         column += lanes<float>()) {
        auto* to = (typename Kind::Stored*)plan.rows.output + tile.start * width + column;
        const float* from = sums + tile.place * kPanel + column % kPanel;
        for (int64_t row = 0; row < tile.rows; ++row) {
            Floats value = load(from + row * kPanel);
            if (plan.weight.scale) value = value * load(plan.weight.scale + column);
            if (plan.weight.bias) value = value + load(plan.weight.bias + column);
            store_row(to + row * width, value, width - column);
        }
    }
}

// STORED: of weights that become words by blocks, before they are multiplied; else void.
template <class STORED> constexpr bool kWidens = !std::is_void<STORED>::value;

template <class Kind, class STORED> int64_t tile_rows_of(int64_t num_rows) {
    if (kWidens<STORED> || Kind::kAlike) return Kind::Widened::kTileRows;
    return num_rows <= kWaitingRows ? kWholeRows : Kind::kTileRows;
}

// All rows of the pass through steps [start, start + steps) of one panel, which are at `block`.
template <class Kind>
void run_block(Kind, const LinearPlan& plan, const char* block, int64_t start, int64_t steps,
               float* sums) {
    const bool fetch = plan.rows.num_rows >= kFetchRows;
    for (int64_t index = 0; index < plan.num_tiles; ++index) {
        const LinearPlan::Tile tile = plan.tile(index);
        const AddTile add =
            fetch ? tile_of<Kind, kAlong>(tile.rows) : tile_of<Kind, kNothing>(tile.rows);
        add((const float*)block, (const float*)plan.words_of(tile, start * Kind::kParts),
            sums + tile.place * kPanel, steps, start == 0, {block + kFetchAhead, plan.step_bytes});
    }
}

// The same where `widened` are the words of the block.
template <class Kind>
void run_widened(Kind, const LinearPlan& plan, const char* block, const float* widened,
                 int64_t start, int64_t steps, float* sums) {
    // Each tile fetches its part of the next block: memory has the time of all of them.
    constexpr int64_t kTimes = Kind::kParts / Kind::Widened::kParts;
    const int64_t bytes = steps * plan.step_bytes, num_rows = plan.rows.num_rows;
    for (int64_t index = 0; index < plan.num_tiles; ++index) {
        const LinearPlan::Tile tile = plan.tile(index);
        tile_of<typename Kind::Widened, kShare>(tile.rows)(
            widened, (const float*)plan.words_of(tile, start * Kind::kParts),
            sums + tile.place * kPanel, steps * kTimes, start == 0,
            {block + bytes + bytes * tile.start / num_rows,
             plan.step_bytes * tile.rows / num_rows / kTimes});
    }
}

#ifdef SPECINFER_MATRICES

static_assert(kBlockSteps % kMatrixSteps == 0 && kMatrixBlockSteps % kMatrixSteps == 0 &&
                  kWidenedSteps % kMatrixSteps == 0 && kPassRows % MatrixKind::kTileRows == 0 &&
                  kAloneRows<MatrixKind> <= MatrixKind::kTileRows,
              "blocks are whole for the unit, passes whole tiles, and a thread's own rows fit one");

// The same by the matrix unit, of `weights`, which are the block at `block` as words. A single tile
// fetches what follows, each of several its part of the next block.
inline void run_matrices(const LinearPlan& plan, const char* block, const char* weights,
                         int64_t start, int64_t steps, float* sums) {
    const int64_t times = steps / kMatrixSteps, parts = 4 * plan.num_tiles;
    const int64_t lines = (kMatrixSteps * plan.step_bytes / kLine + parts - 1) / parts;
    const char* ahead = block + (plan.num_tiles == 1 ? kFetchMatrices : steps * plan.step_bytes);
    for (int64_t index = 0; index < plan.num_tiles; ++index) {
        const LinearPlan::Tile tile = plan.tile(index);
        const auto add = tile.rows > kMatrixRows ? add_matrices<true> : add_matrices<false>;
        add(weights, (const char*)plan.words_of(tile, start), tile.rows,
            sums + tile.place * kPanel, times, start == 0, ahead, lines);
        ahead += times * 4 * lines * kLine;
    }
}

inline void run_block(MatrixKind, const LinearPlan& plan, const char* block, int64_t start,
                      int64_t steps, float* sums) {
    run_matrices(plan, block, block, start, steps, sums);
}

inline void run_widened(MatrixKind, const LinearPlan& plan, const char* block,
                        const float* widened, int64_t start, int64_t steps, float* sums) {
    run_matrices(plan, block, (const char*)widened, start, steps, sums);
}

#endif

// Most rows of a pass that two tiles have.
template <class Kind> constexpr int64_t kSpareRows = Kind::kAlike ? kPassRows / Kind::kTileRows : 0;

// Steps that all tiles take before the next ones.
template <class Kind, class STORED> int64_t block_steps(const LinearPlan& plan) {
    if (kWidens<STORED>) return kWidenedSteps;
    const bool once = Kind::kAlike || plan.rows.num_rows <= kWholeRows;
    if (once && plan.num_tiles == 1) return plan.steps;
    return Kind::kAlike ? kMatrixBlockSteps : kBlockSteps;
}

// All rows of the pass through one panel.
template <class Kind, class STORED> void run_panel(const LinearPlan& plan, int64_t panel) {
    alignas(64) float sums[(kPassRows + kSpareRows<Kind>)*kPanel];
    alignas(64) float widened[kWidens<STORED> ? kWidenedSteps * kPanel * Kind::kParts : 1];
    const char* source = (const char*)plan.weight.panels + panel * plan.panel_bytes;
    const int64_t most = block_steps<Kind, STORED>(plan);
    for (int64_t start = 0; start < plan.steps; start += most) {
        const int64_t steps = std::min(most, plan.steps - start);
        const char* block = source + start * plan.step_bytes;
        if constexpr (kWidens<STORED>) {
            widen_block(Kind(), (const STORED*)block, steps, widened);
            run_widened(Kind(), plan, block, widened, start, steps, sums);
        } else {
            run_block(Kind(), plan, block, start, steps, sums);
        }
    }
    for (int64_t index = 0; index < plan.num_tiles; ++index)
        store_tile<Kind>(plan, plan.tile(index), panel, sums);
}

// What a thread's registers are to hold; nothing to say but for the matrix unit.
template <class Kind> struct Registers {
    explicit Registers(int64_t) {}
};
#ifdef SPECINFER_MATRICES
template <> struct Registers<MatrixKind> : MatrixRegisters {
    using MatrixRegisters::MatrixRegisters;
};
#endif

// A thread's share of the panels, which others may finish.
struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

// One pass over the weight for at most kPassRows rows.
template <class Kind, class STORED>
void run_pass(LinearPlan plan, uint32_t* words, int threads) {
    std::vector<Share> shares(static_cast<size_t>(threads));
    for (int thread = 0; thread < threads; ++thread) {
        shares[size_t(thread)].next = plan.panels * thread / threads;
        shares[size_t(thread)].end = plan.panels * (thread + 1) / threads;
    }
    const int64_t chunk = std::max<int64_t>(1, kChunkBytes / plan.panel_bytes);
    const int64_t blocks = (plan.steps + kBlockSteps - 1) / kBlockSteps;
    // A single row of whole words is its own layout.
    const bool laid_out = Kind::kParts == 1 && plan.rows.num_rows == 1 &&
                          plan.weight.in_features % Kind::kInputs == 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        LinearPlan own_plan = plan;
        const int own = omp_get_thread_num();
        uint32_t* own_words = words + (plan.alone ? own * plan.num_words() : 0);
        own_plan.words = laid_out ? (const uint32_t*)plan.rows.input : own_words;
        if (!laid_out && plan.alone) lay_out_rows<Kind>(plan, 0, plan.steps, own_words);
        if (!laid_out && !plan.alone) {
#pragma omp for
            for (int64_t block = 0; block < blocks; ++block)
                lay_out_rows<Kind>(plan, block * kBlockSteps,
                                   std::min(plan.steps, (block + 1) * kBlockSteps), words);
        }
        const Registers<Kind> registers(plan.tile_rows);
        for (int turn = 0; turn < threads; ++turn) {
            Share& share = shares[size_t((own + turn) % threads)];
            for (int64_t start; (start = share.next.fetch_add(chunk)) < share.end;)
                for (int64_t panel = start; panel < std::min(start + chunk, share.end); ++panel)
                    run_panel<Kind, STORED>(own_plan, panel);
        }
    }
}

template <class Kind, class STORED>
void multiply(const LinearWeight& weight, const LinearRows& rows, int64_t num_threads) {
    LinearPlan plan{};
    plan.weight = weight;
    plan.steps = (weight.in_features + Kind::kInputs - 1) / Kind::kInputs;
    plan.row_words = plan.steps * Kind::kParts;
    plan.alike = Kind::kAlike;
    plan.panels = (weight.out_features + kPanel - 1) / kPanel;
    constexpr int kBytes = std::is_same<STORED, int8_t>::value ? 1 : sizeof(typename Kind::Stored);
    plan.step_bytes = kPanel * Kind::kInputs * kBytes;
    plan.panel_bytes = plan.steps * plan.step_bytes;
    const int64_t work = weight.in_features * weight.out_features * (rows.num_rows + 8);
    const int threads = work < kSerialLinear ? 1 : int(std::min(num_threads, plan.panels));
    const int64_t passes = (rows.num_rows + kPassRows - 1) / kPassRows;
    const int64_t most_rows = (rows.num_rows + passes - 1) / passes;
    // To wait for the others, and to read what they wrote, takes longer than to lay a tile out.
    plan.alone = most_rows <= kAloneRows<Kind> && threads * most_rows * plan.row_words <= kOwnWords;
    const int64_t copied = plan.alone ? threads * most_rows : most_rows + kSpareRows<Kind>;
    const AlignedWords words(copied * plan.row_words);
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t start = rows.num_rows * pass / passes;
        plan.rows = rows;
        plan.rows.num_rows = rows.num_rows * (pass + 1) / passes - start;
        plan.rows.input = (const typename Kind::Stored*)rows.input + start * rows.row_stride;
        plan.rows.output = (typename Kind::Stored*)rows.output + start * weight.out_features;
        plan.tile_rows = tile_rows_of<Kind, STORED>(plan.rows.num_rows);
        plan.num_tiles = (plan.rows.num_rows + plan.tile_rows - 1) / plan.tile_rows;
        if (plan.alike)
            plan.tile_rows = (plan.rows.num_rows + plan.num_tiles - 1) / plan.num_tiles;
        run_pass<Kind, STORED>(plan, words.get(), threads);
    }
}

template <class Kind>
void multiply(const LinearWeight& weight, const LinearRows& rows, int64_t threads, bool int8) {
    if (int8) return multiply<Kind, int8_t>(weight, rows, threads);
    if constexpr (Kind::kParts > 1)
        if (rows.num_rows > kWideningRows)
            return multiply<Kind, typename Kind::Stored>(weight, rows, threads);
    multiply<Kind, void>(weight, rows, threads);
}

// A matrix unit takes a weight only where its inputs are a multiple of 32; else pairs do.
inline BFloat16Products bfloat16_products() {
#ifdef SPECINFER_MATRICES
    if (multiplies_matrices()) return kByMatrices;
#endif
#if SPECINFER_TILES == 512
    if (multiplies_pairs()) return kByPairs;
#endif
    return kByHalves;
}

inline bool linear(const LinearWeight& weight, const LinearRows& rows, int64_t num_threads) {
    if (!linear_serves(weight.kind)) return false;
    const bool int8 = weight.kind == kInt8ForFloat || weight.kind == kInt8ForBFloat16;
    if (weight.kind == kFloat || weight.kind == kInt8ForFloat)
        multiply<FloatKind>(weight, rows, num_threads, int8);
#ifdef SPECINFER_MATRICES
    else if (multiplies_matrices() && weight.in_features % (2 * kMatrixSteps) == 0)
        multiply<MatrixKind>(weight, rows, num_threads, int8);
#endif
#if SPECINFER_TILES == 512
    else if (multiplies_pairs())
        multiply<PairKind>(weight, rows, num_threads, int8);
#endif
    else
        multiply<HalvesKind>(weight, rows, num_threads, int8);
    return true;
}

}  // namespace specinfer

#else

namespace specinfer {

inline bool linear_serves(int64_t) { return false; }
inline BFloat16Products bfloat16_products() { return kByNothing; }
inline bool linear(const LinearWeight&, const LinearRows&, int64_t) { return false; }

}  // namespace specinfer

#endif
