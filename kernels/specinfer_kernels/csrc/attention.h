// Paged tree attention on a CPU. See tree_attention.py for the meaning of the arguments.
//
// A row's keys are taken in position order in blocks of kBlock counted from position 0. In a block
// a score is one chain of fused multiply-adds over head_dim, the block's maximum rescales the
// running sums (online softmax, Milakov and Gimelshein 2018), and values are added key by key.
// Where the processor multiplies pairs of bfloat16 both products run in pairs (pair_attention.h),
// and a weight is rounded to bfloat16 before it counts.
// Rows are computed together only where that changes no operation of any of them: a tile of rows
// shares the packing of a block of keys, and registers hold several rows side by side.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace specinfer {

struct AttentionArguments {
    const void* query;
    const void* key_cache;
    const void* value_cache;
    void* output;
    const int32_t* row_offsets;
    const int32_t* context_lens;
    const int32_t* block_tables;
    const uint64_t* ancestors;
    int64_t query_row_stride;
    int64_t query_head_stride;
    int64_t num_rows;
    int64_t num_sequences;
    int64_t max_blocks;
    int64_t num_words;
    int64_t num_blocks;
    int64_t block_size;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t sliding_window;  // 0: none
    double scale;
    double softcap;  // 0: none
    int64_t dtype;   // 0: float32, 1: bfloat16, 2: float64
    int64_t num_threads;
};

enum Status {
    kFine = 0,
    kBadRowOffsets = 1,
    kTableTooShort = 2,
    kBadBlock = 3,
    kBadAncestors = 4,
    kNoMemory = 5,
    kBadSlot = 6,
    kBadDtype = 7,
    kBadPosition = 8,
    kBadHead = 9,
    kBadToken = 10,
    kBadRow = 11,
};

constexpr int kBlock = 64;        // keys of one block; part of the definition of the result's bits
constexpr int kTileQueries = 64;  // query vectors that share a packed block; changes no bit
constexpr int kUnitQueries = 256;  // query vectors of all kv heads of a unit; changes no bit
// Query vectors, and vectors of their keys or values, side by side in registers; change no bit.
#ifdef __AVX512F__
constexpr int kRowsTogether = 4, kVectorsTogether = 4;
#else
constexpr int kRowsTogether = 2, kVectorsTogether = 2;
#endif

// Rows of one sequence, some kv heads and a part of each one's query heads, done by one thread.
struct Unit {
    int32_t sequence, first_row, last_row, first_head, last_head, first_group, last_group;
};

// What a row sees: positions [first, last) of its list; own_rows are its ancestors in the pass.
struct RowKeys {
    int64_t first, last, context;
    const int32_t* own_rows;
    int64_t logical_slot(int64_t position) const {
        return position < context ? position : context + own_rows[position - context];
    }
};

inline int64_t count_bits(const uint64_t* words, int64_t num_words) {
    int64_t count = 0;
    for (int64_t word = 0; word < num_words; ++word) count += __builtin_popcountll(words[word]);
    return count;
}

inline int64_t first_visible(int64_t num_keys, int64_t sliding_window) {
    return sliding_window > 0 ? std::max<int64_t>(0, num_keys - sliding_window) : 0;
}

// Parents come before children, so a row's own bit is its last one.
inline bool own_bit_is_last(const uint64_t* words, int64_t num_words, int64_t own) {
    if (own / 64 >= num_words || !((words[own / 64] >> (own % 64)) & 1)) return false;
    if (own % 64 != 63 && (words[own / 64] >> (own % 64 + 1)) != 0) return false;
    for (int64_t word = own / 64 + 1; word < num_words; ++word)
        if (words[word] != 0) return false;
    return true;
}

// Scratch index of a sequence's first row: the highest node that the row sees, which is itself. A
// drafter grows level by level, so nodes of earlier passes may lie below it. -1: it sees none.
inline int64_t highest_bit(const uint64_t* words, int64_t num_words) {
    for (int64_t word = num_words - 1; word >= 0; --word)
        if (words[word] != 0) return word * 64 + 63 - __builtin_clzll(words[word]);
    return -1;
}

inline Status check_sequence(const AttentionArguments& a, int64_t sequence, int64_t* work) {
    const int64_t begin = a.row_offsets[sequence], end = a.row_offsets[sequence + 1];
    const int64_t context = a.context_lens[sequence];
    if (begin > end || end > a.num_rows || context < 0) return kBadRowOffsets;
    if (begin == end) return kFine;
    const int64_t first_node = highest_bit(a.ancestors + begin * a.num_words, a.num_words);
    if (first_node < 0) return kBadAncestors;
    int64_t lowest = context;
    for (int64_t row = begin; row < end; ++row) {
        const uint64_t* words = a.ancestors + row * a.num_words;
        if (!own_bit_is_last(words, a.num_words, first_node + row - begin)) return kBadAncestors;
        const int64_t num_keys = context + count_bits(words, a.num_words);
        lowest = std::min(lowest, first_visible(num_keys, a.sliding_window));
        *work += num_keys;
    }
    const int64_t num_slots = context + first_node + end - begin;
    if (num_slots > a.max_blocks * a.block_size) return kTableTooShort;
    const int32_t* table = a.block_tables + sequence * a.max_blocks;
    const int64_t last_block = (num_slots - 1) / a.block_size;
    for (int64_t block = lowest / a.block_size; block <= last_block; ++block)
        if (table[block] < 0 || table[block] >= a.num_blocks) return kBadBlock;
    return kFine;
}

inline Status check_layout(const AttentionArguments& a, int64_t* work) {
    if (a.row_offsets[0] != 0 || a.row_offsets[a.num_sequences] != a.num_rows)
        return kBadRowOffsets;
    for (int64_t sequence = 0; sequence < a.num_sequences; ++sequence) {
        const Status status = check_sequence(a, sequence, work);
        if (status != kFine) return status;
    }
    return kFine;
}

#if defined(__GNUC__) && !defined(__clang__)
// Lane j of the first result: a[j] where bit STEP of j is clear, else b[j - STEP]; of the second:
// a[j + STEP], else b[j].
template <class V, class Mask, int STEP> inline void exchange(V& a, V& b) {
    constexpr int size = int(sizeof(V) / sizeof(V{}[0]));
    Mask low, high;
    for (int lane = 0; lane < size; ++lane) {
        low[lane] = (lane & STEP) ? size + lane - STEP : lane;
        high[lane] = (lane & STEP) ? size + lane : lane + STEP;
    }
    const V first = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = first;
}

template <class V, class Mask, int STEP, int SIZE> inline void exchange_all(V* rows) {
#pragma GCC unroll 16
    for (int row = 0; row < SIZE; ++row)
        if (!(row & STEP)) exchange<V, Mask, STEP>(rows[row], rows[row + STEP]);
}

inline void transpose(Floats* rows) {
    exchange_all<Floats, Ints, 1, 16>(rows);
    exchange_all<Floats, Ints, 2, 16>(rows);
    exchange_all<Floats, Ints, 4, 16>(rows);
    exchange_all<Floats, Ints, 8, 16>(rows);
}

inline void transpose(Doubles* rows) {
    exchange_all<Doubles, Longs, 1, 8>(rows);
    exchange_all<Doubles, Longs, 2, 8>(rows);
    exchange_all<Doubles, Longs, 4, 8>(rows);
}
#else
template <class V> inline void transpose(V* rows) {
    constexpr int size = int(sizeof(V) / sizeof(rows[0][0]));
    for (int row = 0; row < size; ++row)
        for (int lane = row + 1; lane < size; ++lane) {
            const auto kept = rows[row][lane];
            rows[row][lane] = rows[lane][row];
            rows[lane][row] = kept;
        }
}
#endif

}  // namespace specinfer

#include "pair_attention.h"

namespace specinfer {

// Scratch of one thread, all 64-byte aligned, sizes fixed by the arguments. The first four hold
// what runs along a kv head's blocks, for every head of a unit; the others serve one block.
template <class T> struct Scratch {
    T *query, *result, *maximum, *total, *scores, *keys, *values;
    std::unique_ptr<char, void (*)(void*)> memory;

    explicit Scratch(int64_t padded_dim) : memory(nullptr, std::free) {
        const int64_t sizes[] = {kUnitQueries * padded_dim, kUnitQueries * padded_dim,
                                 kUnitQueries * lanes<T>(), kUnitQueries * lanes<T>(),
                                 kTileQueries * kBlock,     kBlock * padded_dim,
                                 kBlock * padded_dim};
        int64_t all = 0;
        for (int64_t size : sizes) all += size;
        memory.reset((char*)std::aligned_alloc(kVectorBytes, size_t(all) * sizeof(T)));
        T* next = (T*)memory.get();
        T** parts[] = {&query, &result, &maximum, &total, &scores, &keys, &values};
        for (int part = 0; part < 7; ++part) {
            *parts[part] = next;
            next += sizes[part];
        }
    }
};

template <class Stored> class TileAttention {
    typedef typename Accumulate<Stored>::Type T;
    typedef typename VectorOf<T>::Type V;
    static constexpr int kLanes = kVectorBytes / int(sizeof(T));
    static constexpr int kBlockVectors = kBlock / kLanes;

    static constexpr bool kPairs = std::is_same<Stored, BFloat16>::value;

    const AttentionArguments& a_;
    const int64_t padded_dim_;
    const int64_t group_;  // query heads of a kv head
    const bool in_pairs_;  // the scratch of queries, keys and values holds words
    Scratch<T> scratch_;
    int64_t head_ = 0;  // the kv head at work, and its part of the scratch
    T *query_ = nullptr, *result_ = nullptr, *maximum_ = nullptr, *total_ = nullptr;
    std::vector<int32_t> own_rows_;
    RowKeys rows_[kTileQueries];
    int members_[kTileQueries], group_end_[kTileQueries];  // rows of the block at work, by group
    int64_t offsets_[kBlock];  // of its keys
    const Unit* unit_ = nullptr;  // at work
    int64_t fetch_next_ = 0, fetch_last_ = 0, fetch_step_ = 0;  // positions to ask for, see below
    int group_size_ = 0;
    int num_rows_ = 0;

  public:
    explicit TileAttention(const AttentionArguments& a)
        : a_(a),
          padded_dim_((a.head_dim + kLanes - 1) / kLanes * kLanes),
          group_(a.num_heads / a.num_kv_heads),
          in_pairs_(kPairs && pairs_serve()),
          scratch_(padded_dim_) {}

    bool ready() const { return bool(scratch_.memory); }

    // False when memory ran out; nothing is thrown, for it may run in a thread of its own.
    bool run(const Unit& unit) {
        if (!list_keys(unit)) return false;
        unit_ = &unit;
        for (int head = unit.first_head; head < unit.last_head; ++head) {
            select_head(unit, head);
            load_queries(unit);
        }
        int64_t first = rows_[0].first, last = 0;
        for (int row = 0; row < num_rows_; ++row) {
            first = std::min(first, rows_[row].first);
            last = std::max(last, rows_[row].last);
        }
        int64_t start = first / kBlock * kBlock;
        for (; start < last; start += kBlock) add_block(unit, start);
        for (int head = unit.first_head; head < unit.last_head; ++head) {
            select_head(unit, head);
            store_results(unit);
        }
        return true;
    }

  private:
    void select_head(const Unit& unit, int head) {
        const int64_t skipped = int64_t(head - unit.first_head) * num_rows_ * group_size_;
        head_ = head;
        query_ = scratch_.query + skipped * padded_dim_;
        result_ = scratch_.result + skipped * padded_dim_;
        maximum_ = scratch_.maximum + skipped;
        total_ = scratch_.total + skipped * kLanes;
    }

    bool list_keys(const Unit& unit) {
        num_rows_ = unit.last_row - unit.first_row;
        group_size_ = unit.last_group - unit.first_group;
        const int64_t context = a_.context_lens[unit.sequence];
        const uint64_t* last_words = a_.ancestors + (unit.last_row - 1) * a_.num_words;
        const int64_t stride = highest_bit(last_words, a_.num_words) + 1;
        try {
            own_rows_.resize(size_t(stride * num_rows_));
        } catch (const std::bad_alloc&) {
            return false;
        }
        for (int row = 0; row < num_rows_; ++row) {
            const uint64_t* words = a_.ancestors + (unit.first_row + row) * a_.num_words;
            int32_t* list = own_rows_.data() + stride * row;
            int64_t count = 0;
            for (int64_t word = 0; word < a_.num_words; ++word)
                for (uint64_t bits = words[word]; bits; bits &= bits - 1)
                    list[count++] = int32_t(word * 64 + __builtin_ctzll(bits));
            const int64_t num_keys = context + count;
            rows_[row] = {first_visible(num_keys, a_.sliding_window), num_keys, context, list};
        }
        return true;
    }

    void load_queries(const Unit& unit) {
        const Stored* query = (const Stored*)a_.query;
        for (int row = 0; row < num_rows_; ++row)
            for (int member = 0; member < group_size_; ++member) {
                const int index = row * group_size_ + member;
                const int64_t head = head_ * group_ + unit.first_group + member;
                const Stored* from = query + (unit.first_row + row) * a_.query_row_stride +
                                     head * a_.query_head_stride;
                for (int64_t dim = 0; dim < padded_dim_; dim += kLanes) {
                    if (!in_pairs_)
                        store(query_ + index * padded_dim_ + dim,
                              load_row(from + dim, a_.head_dim - dim));
                    store(result_ + index * padded_dim_ + dim, V{});
                }
                if constexpr (kPairs)
                    if (in_pairs_) load_query_words(from, a_.head_dim, query_words(index));
                maximum_[index] = -std::numeric_limits<T>::infinity();
                store(total_ + index * kLanes, V{});
            }
    }

    // Rows whose lists agree in this block (one is a prefix of the other) are done together. Such
    // groups differ only behind the context, so a head's keys before that are packed once.
    void add_block(const Unit& unit, int64_t start) {
        const int heads = unit.last_head - unit.first_head;
        const int count = group_rows(start);
        int64_t first = start + kBlock;
        for (int member = 0; member < count; ++member)
            first = std::min(first, std::max(start, rows_[members_[member]].first));
        const int64_t shared = std::min<int64_t>(
            kBlock, std::max<int64_t>(0, rows_[0].context - start) / kLanes * kLanes);
        plan_fetches(start + kBlock, heads, count * group_size_);
        for (int head = 0; head < heads; ++head) {
            select_head(unit, unit.first_head + head);
            for (int begin = 0; begin < count; begin = group_end_[begin]) {
                const RowKeys& longest = rows_[members_[begin]];
                const int used = int(std::min<int64_t>(kBlock, longest.last - start));
                const int from = begin ? int(shared) : 0;
                find_keys(unit, longest, start, first);
                pack(from, used);
                attend(members_ + begin, group_end_[begin] - begin, start, used);
            }
        }
    }

    // Orders the rows that see a key of this block by groups, the longest row of each first, and
    // says where each group ends. Returns how many there are.
    int group_rows(int64_t start) {
        bool done[kTileQueries];
        for (int row = 0; row < num_rows_; ++row)
            done[row] = rows_[row].last <= start || rows_[row].first >= start + kBlock;
        int count = 0;
        for (;;) {
            int longest = -1;
            for (int row = 0; row < num_rows_; ++row)
                if (!done[row] && (longest < 0 || rows_[row].last > rows_[longest].last))
                    longest = row;
            if (longest < 0) return count;
            const int begin = count;
            members_[count++] = longest;
            done[longest] = true;
            for (int row = 0; row < num_rows_; ++row) {
                if (done[row] || !same_keys(rows_[row], rows_[longest], start)) continue;
                done[row] = true;
                members_[count++] = row;
            }
            group_end_[begin] = count;
        }
    }

    static bool same_keys(const RowKeys& row, const RowKeys& longest, int64_t start) {
        const int64_t last = std::min(start + kBlock, row.last);
        for (int64_t position = std::max(start, row.context); position < last; ++position)
            if (row.logical_slot(position) != longest.logical_slot(position)) return false;
        return true;
    }

    // Element offsets in the caches of a sequence's logical slots, for its first kv head.
    class Offsets {
        const AttentionArguments& a_;
        const int32_t* table_;
        int64_t first_ = 0, end_ = 0, shift_ = 0;  // the block last looked up

      public:
        Offsets(const AttentionArguments& a, int64_t sequence)
            : a_(a), table_(a.block_tables + sequence * a.max_blocks) {}
        int64_t of(int64_t slot) {
            if (slot < first_ || slot >= end_) {
                const int64_t block = slot / a_.block_size;
                first_ = block * a_.block_size;
                end_ = first_ + a_.block_size;
                shift_ = table_[block] * a_.block_size - first_;
            }
            return (slot + shift_) * a_.num_kv_heads * a_.head_dim;
        }
    };

    // The committed keys of the next block are asked for in steps while a block is computed: asked
    // for at once they would hold the thread up. The heads of a unit lie side by side, and in this
    // order memory streams; head by head it does not.
    void plan_fetches(int64_t start, int heads, int queries) {
        const int64_t steps = int64_t(heads) * (2 + 2 * ((queries + kRowsTogether - 1) / kRowsTogether));
        fetch_next_ = std::max(start, rows_[0].first);
        fetch_last_ = std::min(start + kBlock, rows_[0].context);
        fetch_step_ = (kBlock + steps - 1) / steps;
    }

    void fetch_some() {
        const int64_t last = std::min(fetch_last_, fetch_next_ + fetch_step_);
        if (fetch_next_ >= last) return;
        const int64_t bytes =
            (unit_->last_head - unit_->first_head) * a_.head_dim * int64_t(sizeof(Stored));
        Offsets offsets(a_, unit_->sequence);
        for (; fetch_next_ < last; ++fetch_next_) {
            const int64_t offset = offsets.of(fetch_next_) + unit_->first_head * a_.head_dim;
            for (const void* cache : {a_.key_cache, a_.value_cache})
                for (int64_t byte = 0; byte < bytes; byte += kVectorBytes)
                    __builtin_prefetch((const char*)((const Stored*)cache + offset) + byte, 0, 2);
        }
    }

    // Where the keys of a block are; -1 for places that no member of it sees.
    void find_keys(const Unit& unit, const RowKeys& row, int64_t start, int64_t first) {
        Offsets offsets(a_, unit.sequence);
        for (int place = 0; place < kBlock; ++place) {
            const int64_t position = start + place;
            const bool used = position >= first && position < row.last;
            offsets_[place] = used ? offsets.of(row.logical_slot(position)) : -1;
        }
    }

    // keys becomes [head_dim][kBlock], values [kBlock][padded_dim]; unseen places are zero. What
    // stands before place `from` is there already.
    void pack(int from, int used) {
        const Stored* keys = (const Stored*)a_.key_cache + head_ * a_.head_dim;
        const Stored* values = (const Stored*)a_.value_cache + head_ * a_.head_dim;
        const int64_t head_bytes = a_.head_dim * int64_t(sizeof(Stored));
        for (int place = from; place < used; ++place)
            for (int64_t byte = 0; offsets_[place] >= 0 && byte < head_bytes; byte += kVectorBytes)
                __builtin_prefetch((const char*)(values + offsets_[place]) + byte, 0, 3);
        if constexpr (kPairs)
            if (in_pairs_) {
                const PairPlaces at{offsets_, a_.head_dim, from, used};
                pack_key_words(keys, at, kBlock, (uint32_t*)scratch_.keys);
                fetch_some();
                pack_value_words(values, at, padded_dim_, (uint32_t*)scratch_.values);
                return;
            }
        const int64_t paired = kPairs ? a_.head_dim / 32 * 32 : 0;
        for (int place = from; place < used; place += kLanes) {
            if constexpr (kPairs)
                for (int64_t dim = 0; dim < paired; dim += 32) pack_paired_keys(keys, place, dim);
            for (int64_t dim = paired; dim < a_.head_dim; dim += kLanes)
                pack_keys(keys, place, dim);
        }
        for (int place = from; place < used; ++place)
            for (int64_t dim = 0; dim < padded_dim_; dim += kLanes)
                store(scratch_.values + place * padded_dim_ + dim,
                      offsets_[place] < 0 ? V{}
                                          : load_row(values + offsets_[place] + dim,
                                                     a_.head_dim - dim));
    }

    void pack_keys(const Stored* keys, int place, int64_t dim) {
        V square[kLanes];
        for (int key = 0; key < kLanes; ++key) {
            const int64_t offset = offsets_[place + key];
            square[key] = offset < 0 ? V{} : load_row(keys + offset + dim, a_.head_dim - dim);
        }
        transpose(square);
        const int count = int(std::min<int64_t>(kLanes, a_.head_dim - dim));
        for (int row = 0; row < count; ++row)
            store(scratch_.keys + (dim + row) * kBlock + place, square[row]);
    }

    // Of bfloat16, 32 dimensions at once: two neighbours are one word until they are transposed.
    void pack_paired_keys(const BFloat16* keys, int place, int64_t dim) {
        V square[kLanes];
        for (int key = 0; key < kLanes; ++key) {
            const int64_t offset = offsets_[place + key];
            square[key] = V{};
            if (offset >= 0) std::memcpy(&square[key], keys + offset + dim, sizeof(V));
        }
        transpose(square);
        for (int row = 0; row < kLanes; ++row) {
            T* to = scratch_.keys + (dim + 2 * row) * kBlock + place;
            store(to, (V)((Ints)square[row] << 16));
            store(to + kBlock, (V)((Ints)square[row] & int32_t(0xffff0000)));
        }
    }

    // Adds the packed block to the members. Query vectors that see the same places run together.
    void attend(const int* members, int count, int64_t start, int used) {
        int queries[kTileQueries], firsts[kTileQueries], lasts[kTileQueries], total = 0;
        for (int member = 0; member < count; ++member) {
            const RowKeys& row = rows_[members[member]];
            for (int head = 0; head < group_size_; ++head) {
                queries[total] = members[member] * group_size_ + head;
                firsts[total] = int(std::max<int64_t>(row.first - start, 0));
                lasts[total++] = int(std::min<int64_t>(row.last - start, kBlock));
            }
        }
        int next = 0;
        for (; next + kRowsTogether <= total; next += kRowsTogether) {
            fetch_some();
            score_all<kRowsTogether>(queries + next, used);
        }
        for (; next < total; ++next) score_all<1>(queries + next, used);
        for (int index = 0; index < total; ++index)
            weigh(queries[index], firsts[index], lasts[index]);
        for (next = 0; next < total;) {
            fetch_some();
            bool alike = next + kRowsTogether <= total;
            for (int other = 1; alike && other < kRowsTogether; ++other)
                alike = firsts[next] == firsts[next + other] && lasts[next] == lasts[next + other];
            if (alike) {
                add_all_values<kRowsTogether>(queries + next, firsts[next], lasts[next]);
                next += kRowsTogether;
            } else {
                add_all_values<1>(queries + next, firsts[next], lasts[next]);
                ++next;
            }
        }
    }

    uint32_t* query_words(int query) { return (uint32_t*)(query_ + query * padded_dim_); }

    // Weights of a query in pairs; they take the place of its scores.
    uint32_t* weight_words(int query) { return (uint32_t*)(scratch_.scores + query * kBlock); }

    template <int ROWS> void score_all_pairs(const int* queries, int used) {
        const uint32_t* words[ROWS];
        float* scores[ROWS];
        for (int row = 0; row < ROWS; ++row) {
            words[row] = query_words(queries[row]);
            scores[row] = (float*)scratch_.scores + queries[row] * kBlock;
        }
        const uint32_t* keys = (const uint32_t*)scratch_.keys;
        const int64_t pairs = (a_.head_dim + 1) / 2;
        switch ((used + kLanes - 1) / kLanes) {
            case 1: return score_pairs<ROWS, 1>(words, keys, kBlock, pairs, scores);
            case 2: return score_pairs<ROWS, 2>(words, keys, kBlock, pairs, scores);
            case 3: return score_pairs<ROWS, 3>(words, keys, kBlock, pairs, scores);
            default: return score_pairs<ROWS, 4>(words, keys, kBlock, pairs, scores);
        }
    }

    template <int ROWS> void add_all_pair_values(const int* queries, int first, int last) {
        const uint32_t* words[ROWS];
        float* results[ROWS];
        for (int row = 0; row < ROWS; ++row) words[row] = weight_words(queries[row]);
        const uint32_t* values = (const uint32_t*)scratch_.values;
        for (int64_t dim = 0; dim < padded_dim_;) {
            for (int row = 0; row < ROWS; ++row)
                results[row] = (float*)result_ + queries[row] * padded_dim_ + dim;
            const uint32_t* from = values + dim;
            const bool wide = dim + 4 * kLanes <= padded_dim_;
            if (wide)
                add_pair_values<ROWS, 4>(words, from, padded_dim_, first, last, results);
            else
                add_pair_values<ROWS, 1>(words, from, padded_dim_, first, last, results);
            dim += wide ? 4 * kLanes : kLanes;
        }
    }

    template <int ROWS> void score_all(const int* queries, int used) {
        if constexpr (kPairs)
            if (in_pairs_) return score_all_pairs<ROWS>(queries, used);
        int vector = 0;
        if (used > kBlock - kLanes) {
            for (; vector < kBlockVectors; vector += kVectorsTogether)
                score<ROWS, kVectorsTogether>(queries, vector);
            return;
        }
        for (; vector * kLanes < used; ++vector) score<ROWS, 1>(queries, vector);
    }

    template <int ROWS, int VECTORS> void score(const int* queries, int vector) {
        V sums[ROWS][VECTORS];
        const T* query[ROWS];
        for (int row = 0; row < ROWS; ++row) {
            query[row] = query_ + queries[row] * padded_dim_;
            for (int part = 0; part < VECTORS; ++part) sums[row][part] = V{};
        }
        const T* keys = scratch_.keys + vector * kLanes;
        for (int64_t dim = 0; dim < a_.head_dim; ++dim, keys += kBlock) {
            V key[VECTORS];
            for (int part = 0; part < VECTORS; ++part) key[part] = load(keys + part * kLanes);
            for (int row = 0; row < ROWS; ++row) {
                const V value = splat(query[row][dim]);
                for (int part = 0; part < VECTORS; ++part)
                    sums[row][part] = fma(value, key[part], sums[row][part]);
            }
        }
        for (int row = 0; row < ROWS; ++row)
            for (int part = 0; part < VECTORS; ++part)
                store(scratch_.scores + queries[row] * kBlock + (vector + part) * kLanes,
                      sums[row][part]);
    }

    // Turns the scores of places [first, last) into weights and rescales the running sums.
    void weigh(int query, int first, int last) {
        T* scores = scratch_.scores + query * kBlock;
        const T infinity = std::numeric_limits<T>::infinity();
        const int vectors = (last + kLanes - 1) / kLanes;
        V highest = splat(-infinity);
        for (int vector = 0; vector < vectors; ++vector) {
            V value = load(scores + vector * kLanes) * T(a_.scale);
            if (a_.softcap > 0)
                value = hyperbolic_tangent(value / T(a_.softcap)) * T(a_.softcap);
            if (vector * kLanes < first || (vector + 1) * kLanes > last)
                for (int lane = 0; lane < kLanes; ++lane) {
                    const int place = vector * kLanes + lane;
                    if (place < first || place >= last) value[lane] = -infinity;
                }
            highest = value > highest ? value : highest;
            store(scores + vector * kLanes, value);
        }
        const T maximum = std::max(maximum_[query], highest_lane(highest));
        V total = load(total_ + query * kLanes);
        if (maximum != maximum_[query]) {
            const V decay = splat(exp_nonpositive(maximum_[query] - maximum));
            T* result = result_ + query * padded_dim_;
            for (int64_t dim = 0; dim < padded_dim_; dim += kLanes)
                store(result + dim, load(result + dim) * decay);
            total = total * decay;
            maximum_[query] = maximum;
        }
        for (int vector = 0; vector < vectors; ++vector) {
            const V weight = exp_nonpositive(load(scores + vector * kLanes) - maximum);
            if constexpr (kPairs)
                if (in_pairs_) {
                    alignas(kVectorBytes) T worth[kLanes];
                    store(worth, weight);
                    keep_weights((BFloat16*)weight_words(query) + vector * kLanes, worth);
                    total = total + load(worth);
                    continue;
                }
            store(scores + vector * kLanes, weight);
            total = total + weight;
        }
        store(total_ + query * kLanes, total);
    }

    template <int ROWS> void add_all_values(const int* queries, int first, int last) {
        if constexpr (kPairs)
            if (in_pairs_) return add_all_pair_values<ROWS>(queries, first, last);
        int64_t dim = 0;
        constexpr int64_t kTogether = kVectorsTogether * kLanes;
        for (; dim + kTogether <= padded_dim_; dim += kTogether)
            add_values<ROWS, kVectorsTogether>(queries, first, last, dim);
        for (; dim < padded_dim_; dim += kLanes) add_values<ROWS, 1>(queries, first, last, dim);
    }

    template <int ROWS, int VECTORS>
    void add_values(const int* queries, int first, int last, int64_t dim) {
        V sums[ROWS][VECTORS];
        const T* weights[ROWS];
        for (int row = 0; row < ROWS; ++row) {
            weights[row] = scratch_.scores + queries[row] * kBlock;
            const T* result = result_ + queries[row] * padded_dim_ + dim;
            for (int part = 0; part < VECTORS; ++part)
                sums[row][part] = load(result + part * kLanes);
        }
        const T* values = scratch_.values + first * padded_dim_ + dim;
        for (int place = first; place < last; ++place, values += padded_dim_) {
            V value[VECTORS];
            for (int part = 0; part < VECTORS; ++part) value[part] = load(values + part * kLanes);
            for (int row = 0; row < ROWS; ++row) {
                const V weight = splat(weights[row][place]);
                for (int part = 0; part < VECTORS; ++part)
                    sums[row][part] = fma(weight, value[part], sums[row][part]);
            }
        }
        for (int row = 0; row < ROWS; ++row) {
            T* result = result_ + queries[row] * padded_dim_ + dim;
            for (int part = 0; part < VECTORS; ++part)
                store(result + part * kLanes, sums[row][part]);
        }
    }

    void store_results(const Unit& unit) {
        for (int row = 0; row < num_rows_; ++row)
            for (int member = 0; member < group_size_; ++member) {
                const int index = row * group_size_ + member;
                const int64_t head = head_ * group_ + unit.first_group + member;
                Stored* to = (Stored*)a_.output +
                             ((unit.first_row + row) * a_.num_heads + head) * a_.head_dim;
                const T* lane_totals = total_ + index * kLanes;
                T parts[kLanes];
                std::copy(lane_totals, lane_totals + kLanes, parts);
                for (int half = kLanes / 2; half > 0; half /= 2)
                    for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
                const T* result = result_ + index * padded_dim_;
                for (int64_t dim = 0; dim < a_.head_dim; dim += kLanes)
                    store_row(to + dim, load(result + dim) / parts[0], a_.head_dim - dim);
            }
    }
};

inline std::vector<Unit> make_units(const AttentionArguments& a, int threads) {
    const int64_t group = a.num_heads / a.num_kv_heads;
    int64_t group_step = std::min<int64_t>(group, kTileQueries);
    const int64_t row_step = std::max<int64_t>(1, kTileQueries / group_step);
    int64_t tiles = 0, most_rows = 1;
    for (int64_t sequence = 0; sequence < a.num_sequences; ++sequence) {
        const int64_t rows = a.row_offsets[sequence + 1] - a.row_offsets[sequence];
        tiles += (rows + row_step - 1) / row_step;
        most_rows = std::max(most_rows, std::min(rows, row_step));
    }
    int64_t head_step = std::max<int64_t>(1, kUnitQueries / (most_rows * group_step));
    head_step = std::min(head_step, std::max<int64_t>(1, tiles * a.num_kv_heads / threads));
    head_step = std::min(head_step, a.num_kv_heads);
    // Fewer units than threads: split the heads of a group, at the price of packing keys again.
    while (group_step > 1 &&
           tiles * a.num_kv_heads * ((group + group_step - 1) / group_step) < threads)
        group_step = (group_step + 1) / 2;
    std::vector<Unit> units;
    for (int64_t sequence = 0; sequence < a.num_sequences; ++sequence) {
        const int64_t end = a.row_offsets[sequence + 1];
        for (int64_t row = a.row_offsets[sequence]; row < end; row += row_step)
            for (int64_t head = 0; head < a.num_kv_heads; head += head_step)
                for (int64_t member = 0; member < group; member += group_step)
                    units.push_back({int32_t(sequence), int32_t(row),
                                     int32_t(std::min(row + row_step, end)), int32_t(head),
                                     int32_t(std::min(head + head_step, a.num_kv_heads)),
                                     int32_t(member), int32_t(std::min(member + group_step, group))});
    }
    return units;
}

template <class Stored> Status attend(const AttentionArguments& a, int threads) {
    const std::vector<Unit> units = make_units(a, threads);
    const int64_t count = int64_t(units.size());
    bool fine = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : fine)
    {
        TileAttention<Stored> tile(a);
        fine = tile.ready();
        // The last tiles of a long prompt see the most keys: start with them.
#pragma omp for schedule(dynamic)
        for (int64_t unit = count - 1; unit >= 0; --unit) fine = fine && tile.run(units[size_t(unit)]);
    }
    return fine ? kFine : kNoMemory;
}

}  // namespace specinfer
