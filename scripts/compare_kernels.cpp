// Compare the speed of several builds of the CPU kernels: the selective scan on one thread. The builds take turns call by
// call, so that other work on the machine slows all of them. Prints the least and the first quartile of the time, in
// nanoseconds for one vector of states (one state for each lane of the instruction set).
//
//   c++ -std=c++17 -O2 scripts/compare_kernels.cpp -o compare_kernels -ldl
//   ./compare_kernels ISA BUILD.so [BUILD.so ...]         ISA: 0 portable, 1 AVX2, 2 AVX-512
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../famba/ops/native/src/interface.h"

namespace {

constexpr int64_t BATCH = 2, LENGTH = 197, CHANNELS = 384, STATES = 16;
constexpr int ROUNDS = 150;

using Kernel = int (*)(int, const famba_scan *);

struct Build {
    const char *name;
    Kernel forward, backward;
    int (*lanes)(int);
};

float *uniform(int64_t count, float low, float high) {
    auto *data = static_cast<float *>(std::aligned_alloc(4096, (count * sizeof(float) + 4095) / 4096 * 4096));
    for (int64_t i = 0; i < count; ++i) data[i] = low + (high - low) * static_cast<float>(std::rand()) / RAND_MAX;
    return data;
}

famba_array tokens(int64_t width, float low, float high) {
    return {uniform(BATCH * LENGTH * width, low, high), LENGTH * width, width};
}

famba_scan arguments(bool full) {
    famba_scan p{};
    p.batch = BATCH, p.length = p.chunk = LENGTH, p.channels = CHANNELS, p.states = STATES;
    p.threads = 1, p.scale = 1, p.softplus = full;
    p.u = tokens(CHANNELS, -1, 1), p.delta = tokens(CHANNELS, 0, .1f), p.y = tokens(CHANNELS, 0, 0);
    p.B = tokens(STATES, -1, 1), p.C = tokens(STATES, -1, 1);
    p.A = uniform(CHANNELS * STATES, -16, 0), p.D = uniform(CHANNELS, 1, 1);
    p.dy = tokens(CHANNELS, -1, 1), p.du = tokens(CHANNELS, 0, 0), p.ddelta = tokens(CHANNELS, 0, 0);
    p.dB = tokens(STATES, 0, 0), p.dC = tokens(STATES, 0, 0);
    p.dA = uniform(CHANNELS * STATES, 0, 0), p.dD = uniform(CHANNELS, 0, 0), p.ddelta_bias = uniform(CHANNELS, 0, 0);
    if (full) p.z = tokens(CHANNELS, -1, 1), p.dz = tokens(CHANNELS, 0, 0), p.delta_bias = uniform(CHANNELS, -1, 1);
    return p;
}

void compare(const std::vector<Build> &builds, int isa, bool full, bool backward) {
    famba_scan p = arguments(full);
    if (backward) p.y.data = nullptr;
    std::vector<std::vector<double>> times(builds.size());
    for (int round = 0; round < ROUNDS; ++round)
        for (size_t i = 0; i < builds.size(); ++i) {
            const auto begin = std::chrono::steady_clock::now();
            if ((backward ? builds[i].backward : builds[i].forward)(isa, &p)) std::exit(1);
            times[i].push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
        }
    std::printf("%s%s:", backward ? "backward" : "forward", full ? " with softplus and gate" : "");
    for (size_t i = 0; i < builds.size(); ++i) {
        std::sort(times[i].begin(), times[i].end());
        const double vectors = static_cast<double>(BATCH * LENGTH * CHANNELS * STATES) / builds[i].lanes(isa);
        std::printf("  %s %.2f %.2f", builds[i].name, times[i][0] * 1e9 / vectors, times[i][ROUNDS / 4] * 1e9 / vectors);
    }
    std::printf("\n");
}

}  // namespace

int main(int count, char **values) {
    std::vector<Build> builds;
    for (int i = 2; i < count; ++i) {
        void *library = dlopen(values[i], RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
        builds.push_back({values[i], reinterpret_cast<Kernel>(dlsym(library, "famba_scan_forward")),
                          reinterpret_cast<Kernel>(dlsym(library, "famba_scan_backward")),
                          reinterpret_cast<int (*)(int)>(dlsym(library, "famba_isa_lanes"))});
    }
    if (builds.empty()) return std::fprintf(stderr, "usage: %s ISA BUILD.so [BUILD.so ...]\n", values[0]), 2;
    for (const bool full : {false, true})
        for (const bool backward : {false, true}) compare(builds, std::atoi(values[1]), full, backward);
    return 0;
}
