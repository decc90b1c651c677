// What all kernels use: types of 16 bits, and instructions of the device behind names. No header of CUDA is needed.
//
// Where no NVRTC compiles this, whoever includes it has defined the functions of the first block in plain C++.
#pragma once

#define DEVICE __device__ __forceinline__

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

#ifdef __CUDACC_RTC__
// 2^x; 0 where that is below the smallest normal number.
DEVICE float exp2_of(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float inverse_of(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// What the lane of the warp holds whose number differs in the bits of `mask`.
DEVICE float exchanged(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }
DEVICE float float_of_fp16(unsigned short x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
typedef unsigned short Bits;
DEVICE Bits fp16_of(float x) { Bits y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
DEVICE Bits bf16_of(float x) { Bits y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
// The same number, of which the compiler knows nothing: what depends on it is worked out where it is needed, and takes
// no register meanwhile.
DEVICE int hidden(int x) { asm volatile("" : "+r"(x)); return x; }
DEVICE void assume(bool known) { __builtin_assume(known); }
// Reads memory that no thread of the launch writes.
template <typename N> DEVICE N read(const N* p) { return __ldg(p); }
#endif

// Numbers as they wait in registers, which have 32 bits.
struct waiting_bf16 { unsigned bits; };
struct waiting_fp16 { unsigned bits; };

DEVICE float fetch(const float* p) { return read(p); }
DEVICE waiting_bf16 fetch(const bf16* p) { return {read(&p->bits)}; }
DEVICE waiting_fp16 fetch(const fp16* p) { return {read(&p->bits)}; }

DEVICE float value(float x) { return x; }
DEVICE float value(waiting_bf16 x) { return float_of(x.bits << 16); }
DEVICE float value(waiting_fp16 x) { return float_of_fp16(x.bits); }

DEVICE void store(float* p, float x) { *p = x; }
DEVICE void store(bf16* p, float x) { p->bits = bf16_of(x); }
DEVICE void store(fp16* p, float x) { p->bits = fp16_of(x); }

constexpr float LOG2_E = 1.4426950408889634f;
// What is missing in LOG2_E.
constexpr float LOG2_E_REST = 1.925963033500953e-8f;
constexpr float LN_2 = 0.6931471805599453f;

DEVICE float sigmoid(float x) { return inverse_of(1.f + exp2_of(-x * LOG2_E)); }
DEVICE float slope_of_silu(float x) { const float s = sigmoid(x); return s * (1.f + x * (1.f - s)); }
