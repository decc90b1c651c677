// Vectors of FAMBA_LANES floats, written with the compiler's vector extensions, so that one source serves every
// instruction set: the flags with which a translation unit is compiled decide what the operators become.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "interface.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace famba {
namespace FAMBA_ISA {

constexpr int W = FAMBA_LANES;

typedef float V __attribute__((vector_size(4 * FAMBA_LANES)));
typedef int32_t I __attribute__((vector_size(4 * FAMBA_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * FAMBA_LANES)));
typedef uint16_t H __attribute__((vector_size(2 * FAMBA_LANES)));

#define FAMBA_INLINE inline __attribute__((always_inline))

// Not 0 + x, which is x for all but -0, and so is really added.
FAMBA_INLINE V splat(float x) { return x - V{}; }

template <class To, class From>
FAMBA_INLINE To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

FAMBA_INLINE V maximum(V a, V b) { return a > b ? a : b; }  // b where one is NaN
FAMBA_INLINE V minimum(V a, V b) { return a < b ? a : b; }
FAMBA_INLINE V absolute(V a) { return bits<V>(bits<I>(a) & 0x7fffffff); }

// The numbers that the kernels read and write, always worked on as float32.

struct bf16 {
    uint16_t bits;
};

FAMBA_INLINE V load(const float *p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

FAMBA_INLINE void store(float *p, V x) { std::memcpy(p, &x, sizeof x); }

FAMBA_INLINE V load(const bf16 *p) {
    H h;
    std::memcpy(&h, p, sizeof h);
    return bits<V>(__builtin_convertvector(h, U) << 16);
}

// Rounds to nearest, ties to even, as torch does; NaN stays NaN.
FAMBA_INLINE void store(bf16 *p, V x) {
    const U u = bits<U>(x);
    const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const U quiet = (u >> 16) | 0x40u;
    const U nan = bits<U>(x != x);
    const H h = __builtin_convertvector((nan & quiet) | (~nan & rounded), H);
    std::memcpy(p, &h, sizeof h);
}

// The last channels may fill only a part of a vector: `lanes` of them, the others read as zero.
template <class T>
FAMBA_INLINE V load(const T *p, int lanes) {
    if (__builtin_expect(lanes == W, 1)) return load(p);
    T part[W] = {};
    std::memcpy(part, p, lanes * sizeof(T));
    return load(part);
}

template <class T>
FAMBA_INLINE void store(T *p, V x, int lanes) {
    if (__builtin_expect(lanes == W, 1)) return store(p, x);
    T part[W];
    store(part, x);
    std::memcpy(p, part, lanes * sizeof(T));
}

FAMBA_INLINE float load_one(const float *p) { return *p; }
FAMBA_INLINE float load_one(const bf16 *p) { return bits<float>(static_cast<uint32_t>(p->bits) << 16); }
FAMBA_INLINE void store_one(float *p, float x) { *p = x; }
FAMBA_INLINE void store_one(bf16 *p, float x) {
    const uint32_t u = bits<uint32_t>(x);
    p->bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

FAMBA_INLINE float sum(V x) {
    float part[W];
    store(part, x);
    // In halves: a fixed order, and the one with the smallest error.
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

// The same over the first lanes.
FAMBA_INLINE float sum(V x, int lanes) {
    float part[W] = {};
    std::memcpy(part, &x, lanes * sizeof(float));
    return sum(load(part));
}

// Four sums at once, as far as lanes of four go: lane 4 i + k holds the sum of x[k] over lanes 4 i to 4 i + 3.
FAMBA_INLINE V sum_fours(const V (&x)[4]) {
#if FAMBA_LANES == 4
#define FAMBA_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k + 4, l + 4)
#elif FAMBA_LANES == 8
#define FAMBA_SHUFFLE(a, b, i, j, k, l) \
    __builtin_shufflevector(a, b, i, j, k + 8, l + 8, i + 4, j + 4, k + 12, l + 12)
#else
#define FAMBA_SHUFFLE(a, b, i, j, k, l)                                                                          \
    __builtin_shufflevector(a, b, i, j, k + 16, l + 16, i + 4, j + 4, k + 20, l + 20, i + 8, j + 8, k + 24, l + 24, \
                            i + 12, j + 12, k + 28, l + 28)
#endif
    const V low = FAMBA_SHUFFLE(x[0], x[1], 0, 2, 0, 2) + FAMBA_SHUFFLE(x[0], x[1], 1, 3, 1, 3);
    const V high = FAMBA_SHUFFLE(x[2], x[3], 0, 2, 0, 2) + FAMBA_SHUFFLE(x[2], x[3], 1, 3, 1, 3);
    return FAMBA_SHUFFLE(low, high, 0, 2, 0, 2) + FAMBA_SHUFFLE(low, high, 1, 3, 1, 3);
#undef FAMBA_SHUFFLE
}

FAMBA_INLINE float largest(V x) {
    float most = x[0];
    for (int i = 1; i < W; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;

// Added to a float below 2^22 in magnitude, this leaves the nearest integer in the low bits.
constexpr float ROUND = 12582912.f;

// 2^f for |f| <= 1/2 by the polynomial of least relative error with value 1 at 0 (error below 2e-7, and none at 0:
// slow decays, over which errors would add up, are exact).
constexpr float EXP2[] = {0x1.5bba12p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.f};

// Beyond these 2^x is 0 and infinity; NaN passes.
FAMBA_INLINE V clamp_exponent(V x) { return minimum(splat(129.f), maximum(splat(-150.f), x)); }

FAMBA_INLINE V power_of_two(I n) { return bits<V>((n + 127) << 23); }

// out[g] = 2^(a b[g]), for every a b where `Any`, else for |a b| < 125.
// Stage by stage over all g: one exponential alone is a chain of ten dependent steps, and a processor does not look far
// enough ahead to find the next chain by itself.
template <bool Any, int G>
FAMBA_INLINE void exp2_products(V a, const V (&b)[G], V (&out)[G]) {
    V f[G], r[G];
    for (int g = 0; g < G; ++g) f[g] = Any ? clamp_exponent(a * b[g]) : a * b[g];
    for (int g = 0; g < G; ++g) r[g] = f[g] + ROUND;
    for (int g = 0; g < G; ++g) f[g] = f[g] - (r[g] - ROUND);
    for (int g = 0; g < G; ++g) out[g] = f[g] * EXP2[0] + EXP2[1];
    for (int k = 2; k < 6; ++k)
        for (int g = 0; g < G; ++g) out[g] = out[g] * f[g] + EXP2[k];
    // The integer goes into the exponent; where that might leave its range, by two products, which end at 0 or infinity.
    for (int g = 0; g < G; ++g) {
        const I n = bits<I>(r[g]) - bits<I>(splat(ROUND)), half = n >> 1;
        out[g] = Any ? out[g] * power_of_two(half) * power_of_two(n - half) : bits<V>(bits<I>(out[g]) + (bits<I>(r[g]) << 23));
    }
}

// exp(x), held within 2^-125 and 2^125, so that neither it nor its reciprocal leaves the range of a float.
FAMBA_INLINE V bounded_exponential(V x) {
    const V one[1] = {splat(1.f)};
    V out[1];
    exp2_products<false>(minimum(splat(124.9f), maximum(splat(-124.9f), x * LOG2E)), one, out);
    return out[0];
}

// 1 / x for 2^-125 <= |x| <= 2^126, error below 2e-7: the processor's estimate and a Newton step, since divisions are
// slow in wide vectors.
FAMBA_INLINE V reciprocal(V x) {
#if defined(__AVX512F__) && FAMBA_LANES == 16
    const V r = bits<V>(_mm512_maskz_rcp14_ps(0xffff, bits<__m512>(x)));
    return r + r * (1.f - x * r);
#elif defined(__AVX__) && FAMBA_LANES == 8
    const V r = bits<V>(_mm256_rcp_ps(bits<__m256>(x)));
    return r + r * (1.f - x * r);
#else
    return 1.f / x;
#endif
}

// log(1 + e) for 0 <= e <= 1, relative error below 2e-7, by the polynomial for log(1 + e) / e.
constexpr float LOG1P[] = {0x1.56eddep-8f,  -0x1.e369c4p-6f, 0x1.4069cap-4f,  -0x1.17d2bap-3f, 0x1.874a7cp-3f,
                           -0x1.fcc8c6p-3f, 0x1.553004p-2f,  -0x1.fffeacp-2f, 0x1.fffffep-1f};

FAMBA_INLINE V log1p_unit(V e) {
    V p = splat(LOG1P[0]);
    for (int k = 1; k < 9; ++k) p = p * e + LOG1P[k];
    return p * e;
}

// silu(x) = x sigmoid(x), and its slope sigmoid(x) (1 + x sigmoid(-x)). Far out a sigmoid is 0 exactly, so that its
// product with any number is.
struct Sloped {
    V value, slope;
};

FAMBA_INLINE Sloped silu_with_slope(V x) {
    const V e = bounded_exponential(-x), inverse = reciprocal(1.f + e);
    const V gate = x < -86.f ? V{} : inverse, rest = x > 86.f ? V{} : e * inverse;
    return {x * gate, gate * (1.f + x * rest)};
}

FAMBA_INLINE V silu(V x) { return silu_with_slope(x).value; }

FAMBA_INLINE Sloped softplus_with_slope(V x) {
    const V e = bounded_exponential(-absolute(x));
    const V inverse = reciprocal(1.f + e);
    return {maximum(x, splat(0.f)) + log1p_unit(e), x > 0.f ? inverse : e * inverse};
}

FAMBA_INLINE V softplus(V x) { return softplus_with_slope(x).value; }

// Flushes denormal numbers to zero while it lives: a state that has died away must not slow the scan down.
class FlushDenormals {
  public:
#if defined(__SSE__)
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
    FlushDenormals() {}
    ~FlushDenormals() {}
#endif
};

}  // namespace FAMBA_ISA
}  // namespace famba
