// y = x W^T + b of packed weights for few and many rows. See native_linear.py for the packing.
//
// A panel is 32 outputs: at step s it has one 32-bit word of weights of each (a float32, or two
// bfloat16 of neighbouring inputs). Each output is one chain over the steps in order, see
// linear_tiles.h, or what a matrix unit makes of them, see linear_matrices.h. Nothing else is ever
// summed, so a row's bits depend on neither the other rows nor the threads. Rows lie side by side in
// registers (a tile), and all tiles take a block of steps of a panel while it is in a near cache, so
// memory sees each weight once. int8 weights become words by blocks, and so do halves of words where
// each of several tiles would widen them again.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "linear_matrices.h"
#include "linear_tiles.h"

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

#ifdef SPECINFER_TILES

#include <omp.h>

namespace specinfer {

// None of these changes a bit. Up to kWaitingRows memory is waited for, and tiles pass over a panel
// once; words are widened beforehand for more rows than kWideningRows.
constexpr int64_t kWaitingRows = SPECINFER_TILES == 512 ? 0 : 5;
constexpr int64_t kWideningRows = SPECINFER_TILES == 512 ? 24 : kWholeRows;
constexpr int64_t kLeastRows = 3;  // of a second tile
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
constexpr int64_t kAloneRows = 14;      // most rows that a thread lays out for itself
constexpr int64_t kOwnWords = 1 << 20;  // most words of all threads' own layouts together

inline bool linear_serves(int64_t kind) { return kind >= kFloat && kind <= kInt8ForBFloat16; }

// What the loops of one thread need to know of a product.
struct LinearPlan {
    LinearWeight weight;
    LinearRows rows;
    int64_t steps, panels, num_tiles, tile_rows, step_bytes, panel_bytes;
    int64_t row_words;      // of a row: kParts of each step
    const uint32_t* words;  // rows as words, [tile][step / kRun][part][row of the tile][kRun]
    bool alone;             // each thread lays the rows out for itself
    bool alike;             // all tiles have tile_rows; the last begins among the one before's

    struct Tile {
        int64_t start, rows;
        int64_t place;  // rows whose words lie before its own
    };
    Tile tile(int64_t index) const {
        if (alike)
            return {std::min(index * tile_rows, rows.num_rows - tile_rows), tile_rows,
                    index * tile_rows};
        const int64_t start = tile_start(index);
        return {start, tile_start(index + 1) - start, start};
    }
    const uint32_t* words_of(const Tile& tile, int64_t words_before) const {
        return words + tile.place * row_words + words_before * tile.rows;
    }
    int64_t num_words() const { return (alike ? num_tiles * tile_rows : rows.num_rows) * row_words; }

  private:
    // Of two tiles the first is as large as it can be, so that memory streams for most of the time;
    // fewer than kLeastRows would not fill the multiplier's pipeline.
    int64_t tile_start(int64_t tile) const {
        if (num_tiles == 2 && tile == 1)
            return std::max((rows.num_rows + 1) / 2,
                            std::min(tile_rows, rows.num_rows - kLeastRows));
        return rows.num_rows * tile / num_tiles;
    }
};

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
    if (kWidens<STORED> || Kind::kRun > 1) return Kind::Widened::kTileRows;
    return num_rows <= kWaitingRows ? kWholeRows : Kind::kTileRows;
}

// All rows of the pass through steps [start, start + steps) of one panel, which are at `block`.
template <class Kind>
void run_block(const LinearPlan& plan, const char* block, int64_t start, int64_t steps,
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
void run_widened(const LinearPlan& plan, const char* block, const float* widened, int64_t start,
                 int64_t steps, float* sums) {
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

// The same by the matrix unit, of `weights`, the block at `block` as words. A single tile fetches
// what follows, each of several its part of the next block.
inline void run_matrices(const LinearPlan& plan, const char* block, const char* weights,
                         int64_t start, int64_t steps, float* sums) {
    const int64_t times = steps / kMatrixSteps, parts = 4 * plan.num_tiles;
    const int64_t lines = (kMatrixSteps * plan.step_bytes / kLine + parts - 1) / parts;
    const char* ahead = block + (plan.num_tiles == 1 ? kFetchMatrices : steps * plan.step_bytes);
    for (int64_t index = 0; index < plan.num_tiles; ++index) {
        const LinearPlan::Tile tile = plan.tile(index);
        const auto add = tile.rows > kMatrixLines ? add_matrices<true> : add_matrices<false>;
        add(weights, (const char*)plan.words_of(tile, start), tile.rows,
            sums + tile.place * kPanel, times, start == 0, ahead, lines);
        ahead += times * 4 * lines * kLine;
    }
}

#endif

// Rows of a pass that two tiles may both have, where all tiles have the same number.
template <class Kind> constexpr int64_t kSpareRows = Kind::kRun > 1 ? kPassRows / Kind::kTileRows : 0;

// All rows of the pass through one panel.
template <class Kind, class STORED> void run_panel(const LinearPlan& plan, int64_t panel) {
    alignas(64) float sums[(kPassRows + kSpareRows<Kind>)*kPanel];
    alignas(64) float widened[kWidens<STORED> ? kWidenedSteps * kPanel * Kind::kParts : 1];
    const char* source = (const char*)plan.weight.panels + panel * plan.panel_bytes;
    constexpr bool kMatrix = Kind::kRun > 1;
    const bool once = plan.num_tiles == 1 && (kMatrix || plan.rows.num_rows <= kWholeRows);
    const int64_t most = kWidens<STORED> ? kWidenedSteps
                         : once          ? plan.steps
                         : kMatrix       ? kMatrixBlockSteps
                                         : kBlockSteps;
    for (int64_t start = 0; start < plan.steps; start += most) {
        const int64_t steps = std::min(most, plan.steps - start);
        const char* block = source + start * plan.step_bytes;
        if constexpr (kWidens<STORED>) widen_block(Kind(), (const STORED*)block, steps, widened);
#ifdef SPECINFER_MATRICES
        if constexpr (kMatrix)
            run_matrices(plan, block, kWidens<STORED> ? (const char*)widened : block, start, steps,
                         sums);
        else
#endif
        if constexpr (kWidens<STORED>)
            run_widened<Kind>(plan, block, widened, start, steps, sums);
        else
            run_block<Kind>(plan, block, start, steps, sums);
    }
    for (int64_t index = 0; index < plan.num_tiles; ++index)
        store_tile<Kind>(plan, plan.tile(index), panel, sums);
}

// Words of steps [first, last) of one row of a tile of `rows`; `to`: its word of the first step.
template <class Kind>
void lay_out_row(const typename Kind::Stored* from, int64_t in_features, int64_t first,
                 int64_t last, int64_t rows, uint32_t* to) {
    if constexpr (Kind::kRun > 1) {
        for (int64_t step = first; step < last; step += Kind::kRun)
            std::memcpy(to + step * rows, from + step * Kind::kInputs, 4 * Kind::kRun);
    } else if constexpr (Kind::kParts == Kind::kInputs) {  // a word for each input
        const int64_t end = std::min(last * Kind::kInputs, in_features);
        for (int64_t input = first * Kind::kInputs; input < end; ++input)
            to[input * rows] = bit_cast<uint32_t>(widen(from[input]));
        for (int64_t input = end; input < last * Kind::kInputs; ++input) to[input * rows] = 0;
    } else {
        const int64_t whole = in_features / Kind::kInputs;
        for (int64_t step = first; step < std::min(last, whole); ++step)
            std::memcpy(to + step * rows, from + step * Kind::kInputs, 4);
        if (whole < first || whole >= last) return;
        to[whole * rows] = 0;  // an odd number of inputs: half a word
        std::memcpy(to + whole * rows, from + whole * Kind::kInputs, sizeof(typename Kind::Stored));
    }
}

// The same of every row, where the tiles want them.
template <class Kind>
void lay_out_rows(const LinearPlan& plan, int64_t first, int64_t last, uint32_t* words) {
    const auto* input = (const typename Kind::Stored*)plan.rows.input;
    for (int64_t index = 0; index < plan.num_tiles; ++index) {
        const LinearPlan::Tile tile = plan.tile(index);
        uint32_t* to = words + tile.place * plan.row_words;
        for (int64_t row = 0; row < tile.rows; ++row)
            lay_out_row<Kind>(input + (tile.start + row) * plan.rows.row_stride,
                              plan.weight.in_features, first, last, tile.rows,
                              to + row * Kind::kRun);
    }
}

// What a thread's registers are to hold; nothing to say but for the matrix unit.
template <class Kind> struct Registers {
    explicit Registers(int64_t) {}
};
#ifdef SPECINFER_MATRICES
template <> struct Registers<MatrixKind> : MatrixLines {
    using MatrixLines::MatrixLines;
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

// Memory that begins where a line does.
template <class T> class Lines {
    std::unique_ptr<T, void (*)(void*)> memory_;

  public:
    explicit Lines(int64_t count)
        : memory_((T*)std::aligned_alloc(kVectorBytes,
                                         (size_t(count) * sizeof(T) + kVectorBytes - 1) /
                                             kVectorBytes * kVectorBytes),
                  std::free) {
        if (!memory_) throw std::bad_alloc();
    }
    T* get() const { return memory_.get(); }
};

template <class Kind, class STORED>
void multiply(const LinearWeight& weight, const LinearRows& rows, int64_t num_threads) {
    LinearPlan plan{};
    plan.weight = weight;
    plan.steps = (weight.in_features + Kind::kInputs - 1) / Kind::kInputs;
    plan.row_words = plan.steps * Kind::kParts;
    plan.panels = (weight.out_features + kPanel - 1) / kPanel;
    constexpr int kBytes = std::is_same<STORED, int8_t>::value ? 1 : sizeof(typename Kind::Stored);
    plan.step_bytes = kPanel * Kind::kInputs * kBytes;
    plan.panel_bytes = plan.steps * plan.step_bytes;
    const int64_t work = weight.in_features * weight.out_features * (rows.num_rows + 8);
    const int threads = work < kSerialLinear ? 1 : int(std::min(num_threads, plan.panels));
    const int64_t passes = (rows.num_rows + kPassRows - 1) / kPassRows;
    const int64_t most_rows = (rows.num_rows + passes - 1) / passes;
    // To wait for the others, and to read what they wrote, takes longer than to lay a tile out.
    plan.alone = most_rows <= kAloneRows && threads * most_rows * plan.row_words <= kOwnWords;
    const int64_t copies = plan.alone ? threads : 1;
    const Lines<uint32_t> words(copies * (most_rows + kSpareRows<Kind>) * plan.row_words);
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t start = rows.num_rows * pass / passes;
        plan.rows = rows;
        plan.rows.num_rows = rows.num_rows * (pass + 1) / passes - start;
        plan.rows.input = (const typename Kind::Stored*)rows.input + start * rows.row_stride;
        plan.rows.output = (typename Kind::Stored*)rows.output + start * weight.out_features;
        plan.tile_rows = tile_rows_of<Kind, STORED>(plan.rows.num_rows);
        plan.num_tiles = (plan.rows.num_rows + plan.tile_rows - 1) / plan.tile_rows;
        plan.alike = Kind::kRun > 1;
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
inline bool linear(const LinearWeight&, const LinearRows&, int64_t) { return false; }

}  // namespace specinfer

#endif
