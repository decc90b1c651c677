// What an instruction set provides, work shared among threads, and memory that a thread keeps between calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "interface.h"

namespace famba {

// What each instruction set provides: the kernels.
struct Table {
#define FAMBA_MEMBER(name, arguments) void (*name)(const arguments &);
    FAMBA_KERNELS(FAMBA_MEMBER)
};

// Runs body(context) on up to `threads` threads at once, the calling one among them.
void run_team(int threads, void (*body)(void *), void *context);

// Runs task(i) for each i in [0, count), in any order; what a task computes must not depend on it.
template <class Task>
void for_each(int threads, int64_t count, const Task &task) {
    struct Shared {
        const Task &task;
        std::atomic<int64_t> next;
        int64_t count;
        std::atomic<bool> failed;
    } shared{task, {0}, count, {false}};
    const auto body = [](void *context) {
        auto &s = *static_cast<Shared *>(context);
        try {
            for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.task(i);
        } catch (const std::bad_alloc &) {
            s.failed = true;
        }
    };
    run_team(count < threads ? static_cast<int>(count) : threads, body, &shared);
    if (shared.failed) throw std::bad_alloc();
}

// Aligned floats that grow and are kept: fresh pages for each call would cost as much as the arithmetic.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    float *take(int64_t count) {
        if (count > size_) {
            std::free(data_);
            size_ = 0;
            void *fresh = nullptr;
            data_ = nullptr;
            if (posix_memalign(&fresh, 64, static_cast<size_t>(count) * sizeof(float))) throw std::bad_alloc();
            data_ = static_cast<float *>(fresh);
            size_ = count;
        }
        return data_;
    }

  private:
    float *data_ = nullptr;
    int64_t size_ = 0;
};

// Cuts one piece of memory into arrays of the given lengths, each aligned for the widest vectors.
template <int N>
void carve(Scratch &scratch, const int64_t (&lengths)[N], float **const (&arrays)[N]) {
    const auto padded = [](int64_t length) { return (length + 15) / 16 * 16; };
    int64_t total = 0;
    for (const int64_t length : lengths) total += padded(length);
    float *memory = scratch.take(total);
    for (int i = 0; i < N; ++i) {
        *arrays[i] = memory;
        memory += padded(lengths[i]);
    }
}

// Of the calling thread: for a task's own work, and for what tasks of one call hand over.
inline thread_local Scratch task_scratch, call_scratch;

}  // namespace famba
