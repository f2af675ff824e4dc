// A whole Llama-like decoder in one call, tokens to logits. See decoder_logits.py for the meaning.
//
// Between the ops there is nothing but their order: no framework, no checks of shapes, no memory
// taken for each layer. Each step is the function that the op of that name calls by itself.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "ops.h"

namespace specinfer {

struct DecoderLayer {
    const void* attention_norm;
    const void* mlp_norm;
    const void* query_norm;  // null, as the next: heads are not normalised
    const void* key_norm;
    const LinearWeight* query_key_value;
    const LinearWeight* output;
    const LinearWeight* gate_up;
    const LinearWeight* down;
    double attention_epsilon, mlp_epsilon, head_epsilon;
    double scale;
    double softcap;          // 0: none
    int64_t sliding_window;  // 0: none
};

// What all passes of a decoder have alike.
struct DecoderStack {
    const DecoderLayer* layers;
    const void* embedding;  // [vocab_size, width]
    const void* cosines;
    const void* sines;
    const void* final_norm;
    const LinearWeight* head;
    double final_epsilon;
    int64_t num_layers, width, vocab_size, num_positions, num_heads, num_kv_heads, head_dim, dtype;
};

struct DecoderCaches {
    void* const* keys;  // of each layer, as the next
    void* const* values;
    int64_t num_blocks, block_size;
};

struct DecoderArguments {
    const DecoderStack* stack;
    const DecoderCaches* caches;
    const int64_t* token_ids;
    const int64_t* positions;
    const int64_t* slots;
    const int64_t* wanted;  // rows whose logits are
    const int32_t* row_offsets;
    const int32_t* context_lens;
    const int32_t* block_tables;
    const uint64_t* ancestors;
    float* logits;  // [num_wanted, out_features of the head]
    int64_t num_rows, num_wanted, num_sequences, max_blocks, num_words, num_threads;
};

// What lies between the ops; taken once for a pass and used by every layer in turn.
struct DecoderBuffers {
    char *hidden, *normed, *mixed, *query, *attended, *update, *gate_up, *gated, *wanted, *last;
    std::unique_ptr<char, void (*)(void*)> memory;

    DecoderBuffers(const DecoderStack& stack, int64_t num_rows, int64_t num_wanted)
        : memory(nullptr, std::free) {
        int64_t mixed_width = 0, gate_width = 0;
        for (int64_t index = 0; index < stack.num_layers; ++index) {
            mixed_width = std::max(mixed_width, stack.layers[index].query_key_value->out_features);
            gate_width = std::max(gate_width, stack.layers[index].down->in_features);
        }
        const int64_t query_width = stack.num_heads * stack.head_dim, width = stack.width;
        const int64_t widths[] = {width, width,          mixed_width, query_width, query_width,
                                  width, 2 * gate_width, gate_width,  width,       width};
        char** parts[] = {&hidden, &normed,  &mixed, &query,  &attended,
                          &update, &gate_up, &gated, &wanted, &last};
        constexpr int kParts = 10, kOfRows = 8;
        int64_t offsets[kParts], end = 0;
        for (int part = 0; part < kParts; ++part) {
            offsets[part] = end;
            const int64_t rows = part < kOfRows ? num_rows : num_wanted;
            const int64_t bytes = rows * widths[part] * (stack.dtype == 0 ? 4 : 2);
            end += (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
        }
        memory.reset((char*)std::aligned_alloc(kVectorBytes, size_t(end)));
        if (!memory) throw std::bad_alloc();
        for (int part = 0; part < kParts; ++part) *parts[part] = memory.get() + offsets[part];
    }
};

class DecoderPass {
    const DecoderArguments& a_;
    const DecoderStack& stack_;
    DecoderBuffers to_;
    size_t row_bytes_;

  public:
    explicit DecoderPass(const DecoderArguments& a)
        : a_(a),
          stack_(*a.stack),
          to_(*a.stack, a.num_rows, a.num_wanted),
          row_bytes_(size_t(a.stack->width * (a.stack->dtype == 0 ? 4 : 2))) {}

    int run() const {
        const DecoderLayer& first = stack_.layers[0];
        int status = embed();
        if (status == kFine)
            status = normalise(first.attention_norm, first.attention_epsilon, nullptr);
        for (int64_t index = 0; status == kFine && index < stack_.num_layers; ++index)
            status = run_layer(index);
        return status == kFine && a_.num_wanted ? take_logits() : status;
    }

  private:
    // Nothing is written before all numbers are known to be in range; those of slots and blocks the
    // ops of the first layer look at.
    int embed() const {
        for (int64_t row = 0; row < a_.num_rows; ++row)
            if (a_.token_ids[row] < 0 || a_.token_ids[row] >= stack_.vocab_size) return kBadToken;
        for (int64_t index = 0; index < a_.num_wanted; ++index)
            if (a_.wanted[index] < 0 || a_.wanted[index] >= a_.num_rows) return kBadRow;
        for (int64_t row = 0; row < a_.num_rows; ++row)
            std::memcpy(to_.hidden + row_bytes_ * size_t(row),
                        (const char*)stack_.embedding + row_bytes_ * size_t(a_.token_ids[row]),
                        row_bytes_);
        return kFine;
    }

    int take_logits() const {
        const int64_t width = stack_.width, count = a_.num_wanted * stack_.head->out_features;
        for (int64_t index = 0; index < a_.num_wanted; ++index)
            std::memcpy(to_.wanted + row_bytes_ * size_t(index),
                        to_.hidden + row_bytes_ * size_t(a_.wanted[index]), row_bytes_);
        const NormArguments norm{to_.wanted, nullptr, stack_.final_norm, to_.last, a_.num_wanted,
                                 width,      width,   width,             stack_.final_epsilon};
        const int status = norm_rows(norm, stack_.dtype, a_.num_threads);
        if (status != kFine) return status;
        // Narrow ones go into the second half of their place first.
        char* place = (char*)a_.logits + (stack_.dtype == 0 ? 0 : 2 * count);
        if (!linear(*stack_.head, {to_.last, place, a_.num_wanted, width}, a_.num_threads))
            return kBadDtype;
        if (stack_.dtype != 0) widen_in_place(a_.logits, count);
        return kFine;
    }

    // Front to back: what is written ends before what is still to be read.
    static void widen_in_place(float* values, int64_t count) {
        const BFloat16* from = (const BFloat16*)(values) + count;
        constexpr int64_t kLanes = lanes<float>();
        int64_t index = 0;
        for (; index + kLanes <= count; index += kLanes)
            store(values + index, load_row(from + index, kLanes));
        for (; index < count; ++index) values[index] = widen(from[index]);
    }

    int run_layer(int64_t index) const {
        const DecoderLayer& layer = stack_.layers[index];
        int status = multiply(layer.query_key_value, to_.normed, to_.mixed);
        if (status == kFine) status = turn(index);
        if (status == kFine) status = attend(index);
        if (status == kFine) status = multiply(layer.output, to_.attended, to_.update);
        if (status == kFine) status = normalise(layer.mlp_norm, layer.mlp_epsilon, to_.update);
        if (status == kFine) status = multiply(layer.gate_up, to_.normed, to_.gate_up);
        if (status == kFine) status = gate(layer.down->in_features);
        if (status == kFine) status = multiply(layer.down, to_.gated, to_.update);
        if (status != kFine) return status;
        const DecoderLayer* next = index + 1 < stack_.num_layers ? &layer + 1 : nullptr;
        if (next) return normalise(next->attention_norm, next->attention_epsilon, to_.update);
        return normalise(nullptr, 0, to_.update);
    }

    int multiply(const LinearWeight* weight, const char* from, char* output) const {
        const LinearRows rows{from, output, a_.num_rows, weight->in_features};
        return linear(*weight, rows, a_.num_threads) ? kFine : kBadDtype;
    }

    int normalise(const void* weight, double epsilon, const char* update) const {
        const NormArguments norm{to_.hidden, update,   weight,   to_.normed, a_.num_rows,
                                 stack_.width,  stack_.width, stack_.width, epsilon};
        return norm_rows(norm, stack_.dtype, a_.num_threads);
    }

    int gate(int64_t width) const {
        return gate_rows({to_.gate_up, to_.gated, a_.num_rows, width, 2 * width}, stack_.dtype,
                         a_.num_threads);
    }

    int turn(int64_t index) const {
        const DecoderLayer& layer = stack_.layers[index];
        RotaryArguments rotary{};
        rotary.mixed = to_.mixed;
        rotary.cosines = stack_.cosines;
        rotary.sines = stack_.sines;
        rotary.positions = a_.positions;
        rotary.slots = a_.slots;
        rotary.query_weight = layer.query_norm;
        rotary.key_weight = layer.key_norm;
        rotary.query = to_.query;
        rotary.key_cache = a_.caches->keys[index];
        rotary.value_cache = a_.caches->values[index];
        rotary.num_rows = a_.num_rows;
        rotary.mixed_stride = layer.query_key_value->out_features;
        rotary.num_heads = stack_.num_heads;
        rotary.num_kv_heads = stack_.num_kv_heads;
        rotary.head_dim = stack_.head_dim;
        rotary.num_positions = stack_.num_positions;
        rotary.num_slots = a_.caches->num_blocks * a_.caches->block_size;
        rotary.epsilon = layer.head_epsilon;
        return turn_rows(rotary, stack_.dtype, a_.num_threads);
    }

    int attend(int64_t index) const {
        const DecoderLayer& layer = stack_.layers[index];
        AttentionArguments attention{};
        attention.query = to_.query;
        attention.key_cache = a_.caches->keys[index];
        attention.value_cache = a_.caches->values[index];
        attention.output = to_.attended;
        attention.row_offsets = a_.row_offsets;
        attention.context_lens = a_.context_lens;
        attention.block_tables = a_.block_tables;
        attention.ancestors = a_.ancestors;
        attention.query_row_stride = stack_.num_heads * stack_.head_dim;
        attention.query_head_stride = stack_.head_dim;
        attention.num_rows = a_.num_rows;
        attention.num_sequences = a_.num_sequences;
        attention.max_blocks = a_.max_blocks;
        attention.num_words = a_.num_words;
        attention.num_blocks = a_.caches->num_blocks;
        attention.block_size = a_.caches->block_size;
        attention.num_heads = stack_.num_heads;
        attention.num_kv_heads = stack_.num_kv_heads;
        attention.head_dim = stack_.head_dim;
        attention.sliding_window = layer.sliding_window;
        attention.scale = layer.scale;
        attention.softcap = layer.softcap;
        attention.dtype = stack_.dtype;
        attention.num_threads = a_.num_threads;
        return attend_to_trees(attention);
    }
};

}  // namespace specinfer
