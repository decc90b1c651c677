// Residual addition and RMS norm, row by row.
#pragma once

#include <cmath>

#include "scan.hpp"

namespace famba {
namespace FAMBA_ISA {

// Rows of one task; fixed, so that sums over rows do not depend on the number of threads.
constexpr int64_t NORM_ROWS = 256;

// Calls work(channel, lanes) for each block of channels.
template <class Work>
FAMBA_INLINE void for_blocks(int64_t channels, const Work &work) {
    int64_t c = 0;
    for (; c + W <= channels; c += W) work(c, W);
    if (c < channels) work(c, static_cast<int>(channels - c));
}

inline float inverse_rms(const float *total, int64_t channels, float eps) {
    V squares{};
    for_blocks(channels, [&](int64_t c, int lanes) {
        const V x = load(total + c, lanes);
        squares += x * x;
    });
    return 1.f / std::sqrt(sum(squares) / static_cast<float>(channels) + eps);
}

template <class T>
void norm_forward(const famba_norm &p) {
    const T *x = static_cast<const T *>(p.x);
    T *normed = static_cast<T *>(p.normed);
    for_each(p.threads, (p.rows + NORM_ROWS - 1) / NORM_ROWS, [&](int64_t task) {
        for (int64_t row = task * NORM_ROWS; row < std::min(p.rows, (task + 1) * NORM_ROWS); ++row) {
            const int64_t begin = row * p.channels;
            for_blocks(p.channels, [&](int64_t c, int lanes) {
                V total = load(x + begin + c, lanes);
                if (p.residual) total += load(p.residual + begin + c, lanes);
                store(p.total + begin + c, total, lanes);
            });
            const float inverse = inverse_rms(p.total + begin, p.channels, p.eps);
            for_blocks(p.channels, [&](int64_t c, int lanes) {
                const V total = load(p.total + begin + c, lanes);
                store(normed + begin + c, total * inverse * load(p.weight + c, lanes), lanes);
            });
        }
    });
}

template <class T>
void norm_backward_row(const famba_norm &p, int64_t begin, float *dweight) {
    const T *dnormed = static_cast<const T *>(p.dnormed) + begin;
    const float *total = p.total + begin;
    const float inverse = inverse_rms(total, p.channels, p.eps);
    V dots{};
    for_blocks(p.channels, [&](int64_t c, int lanes) {
        const V product = load(dnormed + c, lanes) * load(total + c, lanes) * inverse;
        store(dweight + c, load(dweight + c) + product);
        dots += product * load(p.weight + c, lanes);
    });
    const float mean = sum(dots) / static_cast<float>(p.channels);
    for_blocks(p.channels, [&](int64_t c, int lanes) {
        const V normed = load(total + c, lanes) * inverse;
        V grad = inverse * (load(dnormed + c, lanes) * load(p.weight + c, lanes) - normed * mean);
        if (p.dtotal) grad += load(p.dtotal + begin + c, lanes);
        store(p.grad + begin + c, grad, lanes);
    });
}

template <class T>
void norm_backward(const famba_norm &p) {
    const int64_t tasks = (p.rows + NORM_ROWS - 1) / NORM_ROWS, padded = (p.channels + W - 1) / W * W;
    float *partial = call_scratch.take(std::max<int64_t>(1, tasks) * padded);
    for_each(p.threads, tasks, [&](int64_t task) {
        float *dweight = partial + task * padded;
        std::fill(dweight, dweight + padded, 0.f);
        for (int64_t row = task * NORM_ROWS; row < std::min(p.rows, (task + 1) * NORM_ROWS); ++row)
            norm_backward_row<T>(p, row * p.channels, dweight);
    });
    for_blocks(p.channels, [&](int64_t c, int lanes) {
        V total{};
        for (int64_t task = 0; task < tasks; ++task) total += load(partial + task * padded + c);
        store(p.dweight + c, total, lanes);
    });
}

}  // namespace FAMBA_ISA
}  // namespace famba
