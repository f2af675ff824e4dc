// Fixed-width vectors and the elementary functions that the kernels share.
//
// Every function is a fixed sequence of IEEE operations on each lane, so a lane's bits depend on
// that lane alone. The compiler lowers 64-byte vectors to whatever the machine has; it must not
// contract or reorder arithmetic (-ffp-contract=off, no -ffast-math): where a fused multiply-add
// is wanted it is written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace specinfer {

constexpr int kVectorBytes = 64;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

struct BFloat16 {
    uint16_t bits;
};

// What sums are taken in, for values stored as Stored.
template <class Stored> struct Accumulate { typedef float Type; };
template <> struct Accumulate<double> { typedef double Type; };

template <class T> struct VectorOf;
template <> struct VectorOf<float> { typedef Floats Type; };
template <> struct VectorOf<double> { typedef Doubles Type; };

template <class T> constexpr int lanes() { return kVectorBytes / int(sizeof(T)); }

template <class To, class From> inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "sizes must agree");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <class T> inline typename VectorOf<T>::Type splat(T value) {
    return value - typename VectorOf<T>::Type{};  // x - 0 is x, the sign of zero included
}

template <class T> inline typename VectorOf<T>::Type load(const T* from) {
    typename VectorOf<T>::Type vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

template <class T> inline void store(T* to, const typename VectorOf<T>::Type& vector) {
    std::memcpy(to, &vector, sizeof(vector));
}

inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

inline Doubles fma(const Doubles& a, const Doubles& b, const Doubles& c) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
    return a * b + c;
#endif
}

// The highest lane; there is no NaN.
inline float highest_lane(const Floats& vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)vector);
#else
    float highest = vector[0];
    for (int lane = 1; lane < lanes<float>(); ++lane)
        highest = vector[lane] > highest ? vector[lane] : highest;
    return highest;
#endif
}

inline double highest_lane(const Doubles& vector) {
    double highest = vector[0];
    for (int lane = 1; lane < lanes<double>(); ++lane)
        highest = vector[lane] > highest ? vector[lane] : highest;
    return highest;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(double value, double* to) { *to = value; }
inline void narrow(float value, BFloat16* to) {  // round to nearest, ties to even
    uint32_t bits = bit_cast<uint32_t>(value);
    if (value != value) {
        to->bits = uint16_t((bits >> 16) | 0x40u);  // a NaN must stay a NaN
        return;
    }
    to->bits = uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// e^x for x <= 0 (or NaN): Cody and Waite's reduction and the polynomial of Cephes' expf. Below
// -87 the result, under 2e-38, is flushed to zero.
inline Floats exp_nonpositive(const Floats& x) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = fma(x, splat(1.44269504088896341f), magic);
    const Floats power = shifted - magic;
    Floats rest = fma(power, splat(-0.693359375f), x);
    rest = fma(power, splat(2.12194440e-4f), rest);
    Floats sum = fma(rest, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
    sum = fma(sum, rest, splat(8.3334519073e-3f));
    sum = fma(sum, rest, splat(4.1665795894e-2f));
    sum = fma(sum, rest, splat(1.6666665459e-1f));
    sum = fma(sum, rest, splat(5.0000001201e-1f));
    sum = fma(sum, rest * rest, rest) + 1.0f;
    const Ints exponent = ((Ints)shifted - (Ints)magic + 127) << 23;
    const Floats result = sum * (Floats)exponent;
    return x < splat(-87.0f) ? Floats{} : result;
}

inline Doubles exp_nonpositive(const Doubles& x) {  // for tests and references: exact, not fast
    Doubles result;
    for (int lane = 0; lane < lanes<double>(); ++lane) result[lane] = std::exp(x[lane]);
    return result;
}

inline float exp_nonpositive(float x) { return exp_nonpositive(splat(x))[0]; }
inline double exp_nonpositive(double x) { return std::exp(x); }

// tanh as in Cephes' tanhf: a polynomial near zero, (1 - e) / (1 + e) with e = exp(-2|x|) beyond.
inline Floats hyperbolic_tangent(const Floats& x) {
    const Floats size = x < Floats{} ? -x : x;
    const Floats decay = exp_nonpositive(size * -2.0f);
    const Floats far = (1.0f - decay) / (1.0f + decay);
    const Floats square = x * x;
    Floats sum = fma(square, splat(-5.70498872745e-3f), splat(2.06390887954e-2f));
    sum = fma(sum, square, splat(-5.37397155531e-2f));
    sum = fma(sum, square, splat(1.33314422036e-1f));
    sum = fma(sum, square, splat(-3.33332819422e-1f));
    const Floats near = fma(sum * square, x, x);
    return size < splat(0.625f) ? near : (x < Floats{} ? -far : far);
}

inline Doubles hyperbolic_tangent(const Doubles& x) {
    Doubles result;
    for (int lane = 0; lane < lanes<double>(); ++lane) result[lane] = std::tanh(x[lane]);
    return result;
}

inline Words mix(Words words) {  // the finaliser of splitmix64 (Steele, Lea and Flood, 2014)
    words = (words ^ (words >> 30)) * 0xBF58476D1CE4E5B9ull;
    words = (words ^ (words >> 27)) * 0x94D049BB133111EBull;
    return words ^ (words >> 31);
}

// Natural logarithm of positive normal numbers: fdlibm's e_log.c, operation by operation as in
// reference.py, so that the noise has the same bits in C++, in torch and on every device.
inline Doubles exact_log(const Doubles& value) {
    const Longs bits = (Longs)value;
    const Longs exponent = (bits - 0x3FE6A09E00000000ll) >> 52;
    const Doubles power = __builtin_convertvector(exponent, Doubles);
    const Doubles fraction = (Doubles)(bits - (exponent << 52)) - 1.0;
    const Doubles ratio = fraction / (fraction + 2.0);
    const Doubles square = ratio * ratio;
    const Doubles fourth = square * square;
    Doubles even = fourth * 1.531383769920937332e-01 + 2.222219843214978396e-01;
    even = fourth * (fourth * even + 3.999999999940941908e-01);
    Doubles odd = fourth * 1.479819860511658591e-01 + 1.818357216161805012e-01;
    odd = fourth * odd + 2.857142874366239149e-01;
    odd = square * (fourth * odd + 6.666666666666735130e-01);
    const Doubles half = fraction * 0.5 * fraction;
    const Doubles low = ratio * (half + (even + odd)) + power * 1.90821492927058770002e-10;
    return ((low - half) + fraction) + power * 6.93147180369123816490e-01;
}

inline Doubles gumbel_from_words(const Words& words) {
    const Longs integers = (Longs)((words >> 11) | 1ull);
    const Doubles uniform = __builtin_convertvector(integers, Doubles) * 0x1p-53;
    return -exact_log(-exact_log(uniform));
}

// One vector of a stored row, widened; lanes at and past `count` are zero.
inline Floats load_row(const float* from, int64_t count) {
    if (count >= lanes<float>()) return load(from);
    Floats vector{};
    if (count > 0) std::memcpy(&vector, from, size_t(count) * sizeof(float));
    return vector;
}

inline Doubles load_row(const double* from, int64_t count) {
    if (count >= lanes<double>()) return load(from);
    Doubles vector{};
    if (count > 0) std::memcpy(&vector, from, size_t(count) * sizeof(double));
    return vector;
}

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));

// The compiler would take these apart into quarters.
inline Floats widen(const Halves& halves) {
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#else
    return (Floats)(__builtin_convertvector(halves, Ints) << 16);
#endif
}

inline Halves upper_halves(const Floats& vector) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)vector, 16));
#else
    return __builtin_convertvector((Bits)vector >> 16, Halves);
#endif
}

// What a value is after it was kept as Stored, without a way through memory.
inline Floats rounded(float, const Floats& vector) { return vector; }
inline Doubles rounded(double, const Doubles& vector) { return vector; }
inline Floats rounded(BFloat16, const Floats& vector) {
    const Bits bits = (Bits)vector;
    const Bits near = bits + 0x7FFFu + ((bits >> 16) & 1u);  // to nearest, ties to even
    const Bits quiet = bits | 0x400000u;                     // a NaN must stay a NaN
    return (Floats)((vector == vector ? near : quiet) & 0xFFFF0000u);
}

inline Floats load_row(const BFloat16* from, int64_t count) {
    if (count >= lanes<float>()) {  // on its own: a copy of any size would go through the stack
        Halves whole;
        std::memcpy(&whole, from, sizeof(whole));
        return widen(whole);
    }
    Halves part{};
    if (count > 0) std::memcpy(&part, from, size_t(count) * sizeof(BFloat16));
    return widen(part);
}

// The first `count` lanes of a vector, rounded to the stored format.
inline void store_row(float* to, const Floats& vector, int64_t count) {
    if (count >= lanes<float>()) return store(to, vector);
    std::memcpy(to, &vector, size_t(count) * sizeof(float));
}

inline void store_row(double* to, const Doubles& vector, int64_t count) {
    if (count >= lanes<double>()) return store(to, vector);
    std::memcpy(to, &vector, size_t(count) * sizeof(double));
}

inline void store_row(BFloat16* to, const Floats& vector, int64_t count) {
    const Halves halves = upper_halves(rounded(BFloat16{}, vector));
    if (count >= lanes<float>())
        std::memcpy(to, &halves, sizeof(halves));
    else
        std::memcpy(to, &halves, size_t(count) * sizeof(BFloat16));
}

// The largest value; a NaN never is; -inf where there is none.
template <class T> T largest(const T* values, int64_t count) {
    typedef typename VectorOf<T>::Type V;
    T best = -std::numeric_limits<T>::infinity();
    V highest = splat(best);
    int64_t place = 0;
    for (; place + lanes<T>() <= count; place += lanes<T>()) {
        const V value = load(values + place);
        highest = value > highest ? value : highest;
    }
    for (int lane = 0; lane < lanes<T>(); ++lane) best = std::max(best, highest[lane]);
    for (; place < count; ++place) best = values[place] > best ? values[place] : best;
    return best;
}

}  // namespace specinfer
