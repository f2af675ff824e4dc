// What a decoder layer does to its rows between the products: norms, gates, rotary positions.
// See decoder_rows.py for the meaning. Every value is rounded to the stored format where the stock
// modules round it, so float64, which they narrow, is left to them. A row is done by one thread in
// one order, whatever the other rows are.
#pragma once

#include "vectors.h"

namespace specinfer {

constexpr int64_t kMostHeadDim = 1024;

struct NormArguments {
    void* hidden;        // [num_rows, width]
    const void* update;  // added to hidden first, or null
    const void* weight;  // null: nothing but the addition
    void* output;
    int64_t num_rows, width, hidden_stride, update_stride;
    double epsilon;
};

struct RotaryArguments {
    const void* mixed;  // [num_rows, num_heads + 2 * num_kv_heads, head_dim]
    const void* cosines;
    const void* sines;  // [num_positions, head_dim]
    const int64_t* positions;
    const int64_t* slots;
    const void* query_weight;
    const void* key_weight;  // null: heads are not normalised
    void* query;
    void* key_cache;
    void* value_cache;
    int64_t num_rows, mixed_stride, num_heads, num_kv_heads, head_dim, num_positions, num_slots;
    double epsilon;
};

struct GateArguments {
    const void* gate_up;  // [num_rows, 2 * width]
    void* output;         // [num_rows, width]
    int64_t num_rows, width, stride;
};

template <class Stored> struct Rows {
    typedef typename Accumulate<Stored>::Type T;
    typedef typename VectorOf<T>::Type V;
    static constexpr int kLanes = lanes<T>();
    static constexpr int kChains = 4;  // sums side by side; part of the definition of the bits

    static V rounded(const V& value) { return specinfer::rounded(Stored{}, value); }

    // 1 / root of the mean square, summed in kChains * kLanes chains by place.
    static T inverse_root(const Stored* values, int64_t width, double epsilon) {
        V sums[kChains] = {};
        for (int64_t start = 0; start < width; start += kChains * kLanes)
            for (int chain = 0; chain < kChains; ++chain) {
                const int64_t place = start + chain * kLanes;
                if (place >= width) break;
                const V value = load_row(values + place, width - place);
                sums[chain] = fma(value, value, sums[chain]);
            }
        V total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        T parts[kLanes];
        store(parts, total);
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
        return T(1) / std::sqrt(parts[0] / T(width) + T(epsilon));
    }

    static void norm(const Stored* values, const Stored* weight, int64_t width, double epsilon,
                     Stored* output) {
        const T factor = inverse_root(values, width, epsilon);
        for (int64_t place = 0; place < width; place += kLanes) {
            const int64_t count = width - place;
            const V normed = rounded(load_row(values + place, count) * factor);
            store_row(output + place, load_row(weight + place, count) * normed, count);
        }
    }

    static void add(Stored* hidden, const Stored* update, int64_t width) {
        for (int64_t place = 0; place < width; place += kLanes) {
            const int64_t count = width - place;
            store_row(hidden + place,
                      load_row(hidden + place, count) + load_row(update + place, count), count);
        }
    }

    static void norm_rows(const NormArguments& a, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t row = 0; row < a.num_rows; ++row) {
            Stored* hidden = (Stored*)a.hidden + row * a.hidden_stride;
            if (a.update) add(hidden, (const Stored*)a.update + row * a.update_stride, a.width);
            if (!a.weight) continue;
            norm(hidden, (const Stored*)a.weight, a.width, a.epsilon,
                 (Stored*)a.output + row * a.width);
        }
    }

    // gate * sigmoid(gate) * up. exp sees no positive number, so it never overflows.
    static void gate(const Stored* gate, const Stored* up, int64_t width, Stored* output) {
        for (int64_t place = 0; place < width; place += kLanes) {
            const int64_t count = width - place;
            const V value = load_row(gate + place, count);
            const V decay = exp_nonpositive(value < V{} ? value : -value);
            const V top = value < V{} ? value * decay : value;
            const V silu = rounded(top / (decay + T(1)));
            store_row(output + place, silu * load_row(up + place, count), count);
        }
    }

    static void gate_rows(const GateArguments& a, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t row = 0; row < a.num_rows; ++row) {
            const Stored* from = (const Stored*)a.gate_up + row * a.stride;
            gate(from, from + a.width, a.width, (Stored*)a.output + row * a.width);
        }
    }

    // One head turned to its position: halves swap places, the one that moves up changes sign.
    static void turn(const Stored* head, const Stored* cosines, const Stored* sines, int64_t width,
                     Stored* output) {
        const int64_t half = width / 2;
        for (int64_t start = 0; start < width; start += half) {
            const Stored* other = head + (start ? 0 : half);
            for (int64_t place = 0; place < half; place += kLanes) {
                const int64_t count = half - place, at = start + place;
                const V kept = rounded(load_row(head + at, count) * load_row(cosines + at, count));
                V moved = rounded(load_row(other + place, count) * load_row(sines + at, count));
                if (!start) moved = -moved;
                store_row(output + at, kept + moved, count);
            }
        }
    }

    static void turn_head(const RotaryArguments& a, const void* weight, const Stored* head,
                          int64_t position, Stored* scratch, Stored* output) {
        if (weight) {
            norm(head, (const Stored*)weight, a.head_dim, a.epsilon, scratch);
            head = scratch;
        }
        turn(head, (const Stored*)a.cosines + position * a.head_dim,
             (const Stored*)a.sines + position * a.head_dim, a.head_dim, output);
    }

    static void turn_row(const RotaryArguments& a, int64_t row, Stored* scratch) {
        const Stored* head = (const Stored*)a.mixed + row * a.mixed_stride;
        Stored* query = (Stored*)a.query + row * a.num_heads * a.head_dim;
        const int64_t position = a.positions[row];
        for (int64_t index = 0; index < a.num_heads; ++index, head += a.head_dim)
            turn_head(a, a.query_weight, head, position, scratch, query + index * a.head_dim);
        const int64_t to = a.slots[row] * a.num_kv_heads * a.head_dim;
        Stored* key = (Stored*)a.key_cache + to;
        for (int64_t index = 0; index < a.num_kv_heads; ++index, head += a.head_dim)
            turn_head(a, a.key_weight, head, position, scratch, key + index * a.head_dim);
        std::memcpy((Stored*)a.value_cache + to, head,
                    size_t(a.num_kv_heads * a.head_dim) * sizeof(Stored));
    }

    static void turn_rows(const RotaryArguments& a, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            Stored scratch[kMostHeadDim];
#pragma omp for
            for (int64_t row = 0; row < a.num_rows; ++row) turn_row(a, row, scratch);
        }
    }
};

}  // namespace specinfer
