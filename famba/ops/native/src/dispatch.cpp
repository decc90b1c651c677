// The C interface: which instruction set, which threads.
#include <dlfcn.h>

#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "interface.h"
#include "parallel.hpp"
#include "table.hpp"

namespace famba {

namespace portable {
extern const Table table;
}
#if defined(FAMBA_X86)
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
#endif

namespace {

const Table *find_table(int isa) {
    switch (isa) {
        case FAMBA_PORTABLE: return &portable::table;
#if defined(FAMBA_X86)
        case FAMBA_AVX2: return &avx2::table;
        case FAMBA_AVX512: return &avx512::table;
#endif
        default: return nullptr;
    }
}

// OpenMP's entry point, looked up in the process: torch has loaded its runtime already, and a second pool of threads
// beside it would fight for the same cores. It is there for GCC's runtime and, on Linux, for LLVM's and Intel's.
using OpenMpParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

OpenMpParallel openmp() {
    static const auto entry = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return entry;
}

template <class Params>
int call(void (*Table::*kernel)(const Params &), int isa, const Params *params) {
    const Table *table = find_table(isa);
    if (table == nullptr) return 2;
    try {
        (table->*kernel)(*params);
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

Scratch &task_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

Scratch &call_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

}  // namespace famba

using famba::Table;

extern "C" {

int famba_isa_built(int isa) { return famba::find_table(isa) != nullptr; }

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

int famba_isa_lanes(int isa) {
    const Table *table = famba::find_table(isa);
    return table ? table->lanes : 0;
}

int famba_scan_forward(int isa, const famba_scan *p) { return famba::call(&Table::scan_forward, isa, p); }
int famba_scan_backward(int isa, const famba_scan *p) { return famba::call(&Table::scan_backward, isa, p); }
int famba_conv_forward(int isa, const famba_conv *p) { return famba::call(&Table::conv_forward, isa, p); }
int famba_conv_backward(int isa, const famba_conv *p) { return famba::call(&Table::conv_backward, isa, p); }
int famba_norm_forward(int isa, const famba_norm *p) { return famba::call(&Table::norm_forward, isa, p); }
int famba_norm_backward(int isa, const famba_norm *p) { return famba::call(&Table::norm_backward, isa, p); }
int famba_fuse_forward(int isa, const famba_fuse *p) { return famba::call(&Table::fuse_forward, isa, p); }
int famba_fuse_backward(int isa, const famba_fuse *p) { return famba::call(&Table::fuse_backward, isa, p); }

void famba_struct_sizes(int64_t sizes[4]) {
    sizes[0] = sizeof(famba_scan);
    sizes[1] = sizeof(famba_conv);
    sizes[2] = sizeof(famba_norm);
    sizes[3] = sizeof(famba_fuse);
}

}  // extern "C"
