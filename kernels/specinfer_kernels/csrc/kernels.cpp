// The C interface of the native kernels: plain pointers and integers, no framework.

#include "decoder.h"
#include "ops.h"
#include "ranking.h"
#include "sampling.h"

using namespace specinfer;

namespace {

template <class T>
void sample_rows(const T* logits, int64_t stride, int64_t num_rows, int64_t vocab_size,
                 const int64_t* seeds, const int64_t* positions, const uint8_t* greedy,
                 int64_t* tokens, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < num_rows; ++row)
        tokens[row] = sample(logits + row * stride, vocab_size, seeds[row], positions[row],
                             greedy[row] != 0);
}

template <class Run> int without_exceptions(const Run& run) {
    try {
        return run();
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace

extern "C" {

int specinfer_tree_attention(const AttentionArguments* a) {
    return without_exceptions([&] { return attend_to_trees(*a); });
}

// A whole decoder, from tokens to logits.
int specinfer_decoder_logits(const DecoderArguments* a) {
    if (a->num_rows == 0) return a->num_wanted ? kBadRow : kFine;
    return without_exceptions([&] { return DecoderPass(*a).run(); });
}

// Copies row i of key and value to slot slots[i]; sizes and strides in bytes.
int specinfer_write_kv(const char* key, const char* value, char* key_cache, char* value_cache,
                       const int64_t* slots, int64_t num_rows, int64_t num_slots,
                       int64_t num_kv_heads, int64_t head_bytes, int64_t key_row_stride,
                       int64_t key_head_stride, int64_t value_row_stride,
                       int64_t value_head_stride) {
    for (int64_t row = 0; row < num_rows; ++row)
        if (slots[row] < 0 || slots[row] >= num_slots) return kBadSlot;
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t head = 0; head < num_kv_heads; ++head) {
            const int64_t to = (slots[row] * num_kv_heads + head) * head_bytes;
            std::memcpy(key_cache + to, key + row * key_row_stride + head * key_head_stride,
                        size_t(head_bytes));
            std::memcpy(value_cache + to,
                        value + row * value_row_stride + head * value_head_stride,
                        size_t(head_bytes));
        }
    return kFine;
}

// Rows of `hidden` get `update` added first where there is one.
int specinfer_rms_norm(void* hidden, const void* update, const void* weight, void* output,
                       int64_t num_rows, int64_t width, int64_t hidden_stride,
                       int64_t update_stride, double epsilon, int64_t dtype,
                       int64_t num_threads) {
    const NormArguments a{hidden, update,        weight,        output, num_rows,
                          width,  hidden_stride, update_stride, epsilon};
    return norm_rows(a, dtype, num_threads);
}

int specinfer_silu_multiply(const void* gate_up, int64_t stride, int64_t num_rows, int64_t width,
                            void* output, int64_t dtype, int64_t num_threads) {
    return gate_rows({gate_up, output, num_rows, width, stride}, dtype, num_threads);
}

int specinfer_rotate_and_write_kv(const void* mixed, const void* cosines, const void* sines,
                                  const int64_t* positions, const int64_t* slots,
                                  const void* query_weight, const void* key_weight, void* query,
                                  void* key_cache, void* value_cache, int64_t num_rows,
                                  int64_t mixed_stride, int64_t num_heads, int64_t num_kv_heads,
                                  int64_t head_dim, int64_t num_positions, int64_t num_slots,
                                  double epsilon, int64_t dtype, int64_t num_threads) {
    const RotaryArguments a{mixed,         cosines,      sines,     positions, slots,
                            query_weight,  key_weight,   query,     key_cache, value_cache,
                            num_rows,      mixed_stride, num_heads, num_kv_heads, head_dim,
                            num_positions, num_slots,    epsilon};
    return turn_rows(a, dtype, num_threads);
}

void specinfer_gumbel_noise(const int64_t* seeds, const int64_t* positions, int64_t num_rows,
                            int64_t vocab_size, double* noise, int64_t num_threads) {
    const int threads = threads_for(num_rows * vocab_size * 64, num_rows, num_threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < num_rows; ++row)
        fill_gumbel(seeds[row], positions[row], vocab_size, noise + row * vocab_size);
}

int specinfer_sample_gumbel(const void* logits, int64_t dtype, int64_t stride, int64_t num_rows,
                            int64_t vocab_size, const int64_t* seeds, const int64_t* positions,
                            const uint8_t* greedy, int64_t* tokens, int64_t num_threads) {
    const int threads = threads_for(num_rows * vocab_size * 16, num_rows, num_threads);
    if (dtype == 0)
        sample_rows((const float*)logits, stride, num_rows, vocab_size, seeds, positions, greedy,
                    tokens, threads);
    else if (dtype == 2)
        sample_rows((const double*)logits, stride, num_rows, vocab_size, seeds, positions, greedy,
                    tokens, threads);
    else
        return kBadDtype;
    return kFine;
}

// The token that one row decides, or -1 where it holds a NaN.
int64_t specinfer_draw_row(const void* law, int64_t dtype, int64_t vocab_size, int64_t seed,
                           int64_t position, int64_t greedy) {
    if (dtype == 0) return draw((const float*)law, vocab_size, seed, position, greedy != 0);
    return draw((const double*)law, vocab_size, seed, position, greedy != 0);
}

// tokens and scores: [num_rows, wanted].
void specinfer_rank_tokens(const float* values, int64_t stride, int64_t num_rows,
                           int64_t vocab_size, int64_t wanted, float spread, double* tokens,
                           double* scores, int64_t num_threads) {
    const int threads = threads_for(num_rows * vocab_size * 4, num_rows, num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < num_rows; ++row)
        rank_row(values + row * stride, vocab_size, wanted, spread, tokens + row * wanted,
                 scores + row * wanted);
}

// Whether specinfer_linear serves weights of this kind on this processor.
int specinfer_linear_serves(int64_t kind) { return linear_serves(kind); }

// What multiplies bfloat16 on this processor, one of BFloat16Products.
int specinfer_bfloat16_products() { return bfloat16_products(); }

int specinfer_linear(const LinearWeight* weight, const void* input, int64_t row_stride,
                     int64_t num_rows, void* output, int64_t num_threads) {
    if (num_rows == 0) return kFine;
    const LinearRows rows{input, output, num_rows, row_stride};
    return without_exceptions(
        [&] { return linear(*weight, rows, num_threads) ? kFine : kBadDtype; });
}

}  // extern "C"
