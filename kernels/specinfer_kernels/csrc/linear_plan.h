// What a packed product is told, which rows make a tile, and where the words of its rows lie.
// Knows neither what multiplies them nor how the work is shared.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "linear_tiles.h"

namespace specinfer {

// What multiplies bfloat16; native_linear.py has the same numbers.
enum BFloat16Products { kByNothing = 0, kByHalves = 1, kByPairs = 2, kByMatrices = 3 };
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

namespace specinfer {

constexpr int64_t kLeastRows = 3;  // of a second tile

// What the loops of one thread need to know of a product.
struct LinearPlan {
    LinearWeight weight;
    LinearRows rows;
    int64_t steps, panels, num_tiles, tile_rows, step_bytes, panel_bytes;
    int64_t row_words;      // of a row: kParts of each step
    const uint32_t* words;  // rows as words, [tile][step / kRun][part][row of the tile][kRun]
    bool alone;             // each thread lays the rows out for itself
    // All tiles have tile_rows. The last begins among the rows of the one before where they do not
    // come out even; both have the same bits of those, and one thread stores both.
    bool alike;

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
    int64_t num_words() const {
        return (alike ? num_tiles * tile_rows : rows.num_rows) * row_words;
    }

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

// Words that begin where a line of the cache does.
class AlignedWords {
    std::unique_ptr<uint32_t, void (*)(void*)> memory_;
    static int64_t lines(int64_t count) { return (4 * count + kVectorBytes - 1) / kVectorBytes; }

  public:
    explicit AlignedWords(int64_t count)
        : memory_((uint32_t*)std::aligned_alloc(kVectorBytes, size_t(lines(count)) * kVectorBytes),
                  std::free) {
        if (!memory_) throw std::bad_alloc();
    }
    uint32_t* get() const { return memory_.get(); }
};

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

}  // namespace specinfer

#endif
