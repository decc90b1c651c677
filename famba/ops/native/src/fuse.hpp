// Weighted sums of the tokens that share a place, and their gradient.
#pragma once

#include <vector>

#include "norm.hpp"

namespace famba {
namespace FAMBA_ISA {

template <class T>
void fuse_forward(const famba_fuse &p) {
    for_each(p.threads, p.batch, [&](int64_t image) {
        const Rows<const T> x(p.x, image);
        const Rows<T> y(p.y, image);
        const int64_t *places = p.places + image * p.length;
        const float *weights = p.weights + image * p.length;
        // Tokens sorted by place, those of one place in their order.
        std::vector<int32_t> begin(static_cast<size_t>(p.fused) + 1, 0), tokens(static_cast<size_t>(p.length));
        for (int64_t i = 0; i < p.length; ++i) ++begin[places[i] + 1];
        for (int64_t k = 0; k < p.fused; ++k) begin[k + 1] += begin[k];
        std::vector<int32_t> next(begin.begin(), begin.end() - 1);
        for (int64_t i = 0; i < p.length; ++i) tokens[next[places[i]]++] = static_cast<int32_t>(i);
        for (int64_t k = 0; k < p.fused; ++k)
            for_blocks(p.channels, [&, first = begin[k], last = begin[k + 1]](int64_t c, int lanes) {
                V total{};
                for (int32_t j = first; j < last; ++j) {
                    const V part = load(x.at(tokens[j], c), lanes) * weights[tokens[j]];
                    total = j == first ? part : total + part;
                }
                store(y.at(k, c), total, lanes);
            });
    });
}

// Here y is the gradient that comes in, and x the one that is written.
template <class T>
void fuse_backward(const famba_fuse &p) {
    for_each(p.threads, p.batch, [&](int64_t image) {
        const Rows<T> dx(p.x, image);
        const Rows<const T> dy(p.y, image);
        for (int64_t i = 0; i < p.length; ++i) {
            const int64_t place = p.places[image * p.length + i];
            const float weight = p.weights[image * p.length + i];
            for_blocks(p.channels, [&](int64_t c, int lanes) {
                store(dx.at(i, c), load(dy.at(place, c), lanes) * weight, lanes);
            });
        }
    });
}

}  // namespace FAMBA_ISA
}  // namespace famba
