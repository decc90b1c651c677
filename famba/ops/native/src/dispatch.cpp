// The C interface: which instruction set, which threads.
#include <dlfcn.h>

#include <algorithm>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "interface.h"
#include "parallel.hpp"

namespace famba {

namespace portable { extern const Table table; }
#if defined(FAMBA_X86)
namespace avx2 { extern const Table table; }
namespace avx512 { extern const Table table; }
#endif

namespace {

// As `famba_isa` counts them.
const Table *const tables[] = {
    &portable::table,
#if defined(FAMBA_X86)
    &avx2::table, &avx512::table,
#endif
};

// OpenMP's entry point, looked up in the process: torch has loaded its runtime already, and a second pool of threads
// beside it would fight for the same cores. It is there for GCC's runtime and, on Linux, for LLVM's and Intel's.
using OpenMpParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

OpenMpParallel openmp() {
    static const auto entry = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return entry;
}

template <class Params>
int call(void (*Table::*kernel)(const Params &), int isa, const Params *params) {
    try {
        (tables[isa]->*kernel)(*params);
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}

}  // namespace

void run_team(int threads, void (*body)(void *), void *context) {
    if (threads <= 1) return body(context);
    if (openmp()) return openmp()(body, context, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back(body, context);
    } catch (const std::system_error &) {
        // With fewer threads it takes longer.
    }
    body(context);
    for (auto &other : others) other.join();
}

}  // namespace famba

extern "C" {

int famba_isa_best(void) {
#if defined(FAMBA_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return FAMBA_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FAMBA_AVX2;
#endif
    return FAMBA_PORTABLE;
}

#define FAMBA_DEFINE(name, arguments) \
    int famba_##name(int isa, const arguments *p) { return famba::call(&famba::Table::name, isa, p); }
FAMBA_KERNELS(FAMBA_DEFINE)

void famba_struct_sizes(int64_t sizes[7]) {
    const int64_t found[] = {sizeof(famba_scan),    sizeof(famba_conv),   sizeof(famba_norm),  sizeof(famba_fuse),
                             sizeof(famba_scaling), sizeof(famba_motion), sizeof(famba_lookup)};
    std::copy(found, found + 7, sizes);
}

}  // extern "C"
