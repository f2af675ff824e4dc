// All layers of a Llama-like decoder in one call. See decoder_layers.py for the meaning.
//
// Between the ops there is nothing but their order: no framework, no checks of shapes, no memory
// taken for each layer. Each step is the function that the op of that name calls by itself.
#pragma once

#include <algorithm>
#include <cstdlib>
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

struct DecoderArguments {
    const DecoderLayer* layers;
    void* const* key_caches;  // of each layer, as the next
    void* const* value_caches;
    void* hidden;  // [num_rows, width]; becomes the result
    const int64_t* positions;
    const int64_t* slots;
    const void* cosines;
    const void* sines;
    const int32_t* row_offsets;
    const int32_t* context_lens;
    const int32_t* block_tables;
    const uint64_t* ancestors;
    int64_t num_layers, num_rows, width, num_positions, num_sequences, max_blocks, num_words;
    int64_t num_blocks, block_size, num_heads, num_kv_heads, head_dim, dtype, num_threads;
};

// What lies between the ops of a layer; taken once for a pass and used by every layer in turn.
struct DecoderBuffers {
    char *normed, *mixed, *query, *attended, *update, *gate_up, *gated;
    std::unique_ptr<char, void (*)(void*)> memory;

    explicit DecoderBuffers(const DecoderArguments& a) : memory(nullptr, std::free) {
        int64_t mixed_width = 0, gate_width = 0;
        for (int64_t index = 0; index < a.num_layers; ++index) {
            mixed_width = std::max(mixed_width, a.layers[index].query_key_value->out_features);
            gate_width = std::max(gate_width, a.layers[index].down->in_features);
        }
        const int64_t query_width = a.num_heads * a.head_dim, value_bytes = a.dtype == 0 ? 4 : 2;
        const int64_t widths[] = {a.width, mixed_width,    query_width, query_width,
                                  a.width, 2 * gate_width, gate_width};
        char** parts[] = {&normed, &mixed, &query, &attended, &update, &gate_up, &gated};
        int64_t offsets[7], end = 0;
        for (int part = 0; part < 7; ++part) {
            offsets[part] = end;
            const int64_t bytes = a.num_rows * widths[part] * value_bytes;
            end += (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
        }
        memory.reset((char*)std::aligned_alloc(kVectorBytes, size_t(end)));
        if (!memory) throw std::bad_alloc();
        for (int part = 0; part < 7; ++part) *parts[part] = memory.get() + offsets[part];
    }
};

class DecoderPass {
    const DecoderArguments& a_;
    DecoderBuffers to_;

  public:
    explicit DecoderPass(const DecoderArguments& a) : a_(a), to_(a) {}

    int run() const {
        int status = normalise(a_.layers[0].attention_norm, a_.layers[0].attention_epsilon, nullptr);
        for (int64_t index = 0; status == kFine && index < a_.num_layers; ++index)
            status = run_layer(index);
        return status;
    }

  private:
    int run_layer(int64_t index) const {
        const DecoderLayer& layer = a_.layers[index];
        int status = multiply(layer.query_key_value, to_.normed, to_.mixed);
        if (status == kFine) status = turn(index);
        if (status == kFine) status = attend(index);
        if (status == kFine) status = multiply(layer.output, to_.attended, to_.update);
        if (status == kFine) status = normalise(layer.mlp_norm, layer.mlp_epsilon, to_.update);
        if (status == kFine) status = multiply(layer.gate_up, to_.normed, to_.gate_up);
        if (status == kFine) status = gate(layer.down->in_features);
        if (status == kFine) status = multiply(layer.down, to_.gated, to_.update);
        if (status != kFine) return status;
        const DecoderLayer* next = index + 1 < a_.num_layers ? &layer + 1 : nullptr;
        if (next) return normalise(next->attention_norm, next->attention_epsilon, to_.update);
        return normalise(nullptr, 0, to_.update);
    }

    int multiply(const LinearWeight* weight, const char* from, char* output) const {
        const LinearRows rows{from, output, a_.num_rows, weight->in_features};
        return linear(*weight, rows, a_.num_threads) ? kFine : kBadDtype;
    }

    int normalise(const void* weight, double epsilon, const char* update) const {
        const NormArguments norm{a_.hidden, update,   weight,   to_.normed, a_.num_rows,
                                 a_.width,  a_.width, a_.width, epsilon};
        return norm_rows(norm, a_.dtype, a_.num_threads);
    }

    int gate(int64_t width) const {
        return gate_rows({to_.gate_up, to_.gated, a_.num_rows, width, 2 * width}, a_.dtype,
                         a_.num_threads);
    }

    int turn(int64_t index) const {
        const DecoderLayer& layer = a_.layers[index];
        RotaryArguments rotary{};
        rotary.mixed = to_.mixed;
        rotary.cosines = a_.cosines;
        rotary.sines = a_.sines;
        rotary.positions = a_.positions;
        rotary.slots = a_.slots;
        rotary.query_weight = layer.query_norm;
        rotary.key_weight = layer.key_norm;
        rotary.query = to_.query;
        rotary.key_cache = a_.key_caches[index];
        rotary.value_cache = a_.value_caches[index];
        rotary.num_rows = a_.num_rows;
        rotary.mixed_stride = layer.query_key_value->out_features;
        rotary.num_heads = a_.num_heads;
        rotary.num_kv_heads = a_.num_kv_heads;
        rotary.head_dim = a_.head_dim;
        rotary.num_positions = a_.num_positions;
        rotary.num_slots = a_.num_blocks * a_.block_size;
        rotary.epsilon = layer.head_epsilon;
        return turn_rows(rotary, a_.dtype, a_.num_threads);
    }

    int attend(int64_t index) const {
        const DecoderLayer& layer = a_.layers[index];
        AttentionArguments attention{};
        attention.query = to_.query;
        attention.key_cache = a_.key_caches[index];
        attention.value_cache = a_.value_caches[index];
        attention.output = to_.attended;
        attention.row_offsets = a_.row_offsets;
        attention.context_lens = a_.context_lens;
        attention.block_tables = a_.block_tables;
        attention.ancestors = a_.ancestors;
        attention.query_row_stride = a_.num_heads * a_.head_dim;
        attention.query_head_stride = a_.head_dim;
        attention.num_rows = a_.num_rows;
        attention.num_sequences = a_.num_sequences;
        attention.max_blocks = a_.max_blocks;
        attention.num_words = a_.num_words;
        attention.num_blocks = a_.num_blocks;
        attention.block_size = a_.block_size;
        attention.num_heads = a_.num_heads;
        attention.num_kv_heads = a_.num_kv_heads;
        attention.head_dim = a_.head_dim;
        attention.sliding_window = layer.sliding_window;
        attention.scale = layer.scale;
        attention.softcap = layer.softcap;
        attention.dtype = a_.dtype;
        attention.num_threads = a_.num_threads;
        return attend_to_trees(attention);
    }
};

}  // namespace specinfer
