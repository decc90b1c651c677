// Runs the CUDA kernels of famba/ops/cuda/src on a CPU: the threads of a block as fibres of one thread of the system,
// which take turns at barriers and exchanges; with EMULATE_BY_THREADS as threads of the system, for ThreadSanitizer.
#pragma once
#include <pthread.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static

struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };

namespace emulator {
struct Index { unsigned x, y; };
constexpr int MOST_THREADS = 256, STACK = 256 * 1024;

inline double values[32];  // of the constants that are no part of a type
inline Index grid;
inline thread_local Index block;
inline thread_local unsigned thread;
inline unsigned exchanges[MOST_THREADS];  // that each thread of a block has taken part in
inline float slots[2][MOST_THREADS];

#ifdef EMULATE_BY_THREADS
inline pthread_barrier_t of_block, of_warp[MOST_THREADS / 32];
inline void meet(bool warp) { pthread_barrier_wait(warp ? &of_warp[thread / 32] : &of_block); }

template <typename Kernel> void run_block(Kernel kernel, Index at, unsigned threads) {
    std::vector<std::thread> all;
    pthread_barrier_init(&of_block, nullptr, threads);
    for (unsigned warp = 0; warp < threads / 32; warp++) pthread_barrier_init(&of_warp[warp], nullptr, 32);
    for (unsigned t = 0; t < threads; t++)
        all.emplace_back([=] { block = at; thread = t; exchanges[t] = 0; kernel(); });
    for (auto &one : all) one.join();
}
#else
struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    int state;  // 0 done, 1 at a barrier, 2 at an exchange
};
inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline void (*call)(void *);
inline void *argument;

inline void meet(bool warp) {
    Fibre &mine = fibres[thread];
    mine.state = warp ? 2 : 1;
    swapcontext(&mine.context, &scheduler);
}
inline void enter() { call(argument); fibres[thread].state = 0; }

template <typename Kernel> void run_block(Kernel kernel, Index at, unsigned threads) {
    if (fibres.size() < threads) fibres = std::vector<Fibre>(threads);
    block = at;
    call = [](void *k) { (*(Kernel *)k)(); };
    argument = &kernel;
    for (unsigned t = 0; t < threads; t++) {
        Fibre &one = fibres[t];
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = one.stack.get();
        one.context.uc_stack.ss_size = STACK;
        one.context.uc_link = &scheduler;
        exchanges[t] = 0;
        makecontext(&one.context, enter, 0);
    }
    do {
        for (thread = 0; thread < threads; thread++) swapcontext(&scheduler, &fibres[thread].context);
        for (unsigned t = 1; t < threads; t++)
            if (fibres[t].state != fibres[0].state) {
                std::fprintf(stderr, "thread %u of a block waits where thread 0 does not\n", t);
                std::abort();
            }
    } while (fibres[0].state);
}
#endif

inline float exchange(float x, int mask) {
    // Two sets of slots by turns: nobody writes where another still reads.
    const unsigned turn = exchanges[thread]++ & 1;
    slots[turn][thread] = x;
    meet(true);
    return slots[turn][thread ^ mask];
}

template <typename Argument>
void launch(void (*kernel)(Argument), const void *packed, const double *constants, unsigned x, unsigned y, unsigned threads) {
    Argument argument;
    std::memcpy(&argument, packed, sizeof argument);
    std::memcpy(values, constants, sizeof values);
    grid = {x, y};
    for (unsigned i = 0; i < x * y; i++) run_block([&] { kernel(argument); }, {i % x, i / x}, threads);
}
}  // namespace emulator

#define blockIdx emulator::block
#define gridDim emulator::grid
#define threadIdx (emulator::Index{emulator::thread, 0})
#define __syncthreads() emulator::meet(false)

// The first block of device.cuh in plain C++.
inline float exp2_of(float x) { return x < -126.f ? 0.f : std::exp2(x); }
inline float inverse_of(float x) { return 1.f / x; }
inline float exchanged(float x, int mask) { return emulator::exchange(x, mask); }
inline float float_of(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float float_of_fp16(unsigned short bits) { _Float16 x; std::memcpy(&x, &bits, 2); return x; }
inline unsigned short fp16_of(float x) { const _Float16 y = x; unsigned short bits; std::memcpy(&bits, &y, 2); return bits; }
inline unsigned short bf16_of(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline int hidden(int x) { return x; }
inline void assume(bool) {}
template <typename N> N read(const N *p) { return *p; }
