// The causal depthwise convolution. Tap `width - 1` meets the position itself, earlier taps the steps before it.
#pragma once

#include <array>
#include <type_traits>
#include <vector>

#include "scan.hpp"

namespace famba {
namespace FAMBA_ISA {

// One vector for each tap of the kernel, in registers where the width is known when this is compiled (0: it is not).
template <int WIDTH>
class Taps {
  public:
    explicit Taps(int64_t width) {
        if constexpr (WIDTH == 0) taps_.resize(static_cast<size_t>(width));
    }
    Taps(const float *memory, int64_t width) : Taps(width) {
        for (size_t k = 0; k < taps_.size(); ++k) taps_[k].value = load(memory + k * W);
    }
    FAMBA_INLINE V correlate(const float *window, int64_t stride) const {
        V y = taps_[0].value * load(window);
        for (size_t k = 1; k < taps_.size(); ++k) y += taps_[k].value * load(window + static_cast<int64_t>(k) * stride);
        return y;
    }
    FAMBA_INLINE void add(V factor, const float *window) {
        for (size_t k = 0; k < taps_.size(); ++k) taps_[k].value += factor * load(window + k * W);
    }
    void write(float *out) const {
        for (size_t k = 0; k < taps_.size(); ++k) store(out + k * W, taps_[k].value);
    }

  private:
    struct Tap {
        V value;
    };
    std::conditional_t<WIDTH == 0, std::vector<Tap>, std::array<Tap, WIDTH>> taps_{};
};

// One image and one block of channels in the order of the convolution, x behind `width - 1` steps of zeros.
template <class T, int WIDTH>
class ConvBlock {
  public:
    ConvBlock(const famba_conv &conv, int64_t image, int64_t block)
        : p_(conv), channel_(block * W), lanes_(lanes_of(block, conv.channels)), x_(conv.x, image) {
        const int64_t steps = (p_.length + p_.width - 1) * W;
        carve(task_scratch, {steps, steps, p_.width * W}, {&inputs_, &grads_, &taps_});
        for (int64_t k = 0; k < p_.width; ++k) {
            V tap{};
            for (int i = 0; i < lanes_; ++i) tap[i] = p_.weight[(channel_ + i) * p_.width + k];
            store(taps_ + k * W, tap);
        }
        const int64_t pad = p_.width - 1;
        std::fill(inputs_, inputs_ + pad * W, 0.f);
        for (int64_t s = 0; s < p_.length; ++s)
            store(inputs_ + (s + pad) * W, load(x_.at(position(p_, s), channel_), lanes_));
        bias_ = p_.bias ? load(p_.bias + channel_, lanes_) : V{};
    }

    // By value, and copies: where the address of a number is known, a store of floats might change it, and every use
    // loads it again.
    void forward(const Rows<T> out) const {
        const ConvBlock own = *this;
        const famba_conv p = p_;
        const Taps<WIDTH> taps(taps_, p.width);
        for (int64_t s = 0; s < p.length; ++s) {
            const V y = own.bias_ + taps.correlate(own.inputs_ + s * W, W);
            store(out.at(position(p, s), own.channel_), p.silu ? silu(y) : y, own.lanes_);
        }
    }

    // Writes the input's gradient, and into `partial` (width + 1, W) those of the taps and the bias.
    void backward(const Rows<const T> dy, const Rows<T> dx, float *partial) const {
        const ConvBlock own = *this;
        const famba_conv p = p_;
        const Taps<WIDTH> taps(taps_, p.width);
        Taps<WIDTH> dtaps(p.width);
        V dbias{};
        for (int64_t s = 0; s < p.length; ++s) {
            const float *window = own.inputs_ + s * W;
            V grad = load(dy.at(position(p, s), own.channel_), own.lanes_);
            if (p.silu) grad *= silu_with_slope(own.bias_ + taps.correlate(window, W)).slope;
            dbias += grad;
            dtaps.add(grad, window);
            store(own.grads_ + s * W, grad);
        }
        dtaps.write(partial);
        store(partial + p.width * W, dbias);
        std::fill(own.grads_ + p.length * W, own.grads_ + (p.length + p.width - 1) * W, 0.f);
        for (int64_t s = 0; s < p.length; ++s) {
            // A position is met by the last tap of its own window, and by earlier taps of those that follow.
            V grad = taps.correlate(own.grads_ + (s + p.width - 1) * W, -W);
            T *out = dx.at(position(p, s), own.channel_);
            if (p.accumulate) grad += load(out, own.lanes_);
            store(out, grad, own.lanes_);
        }
    }

  private:
    const famba_conv &p_;
    int64_t channel_;
    int lanes_;
    Rows<const T> x_;
    float *inputs_, *grads_, *taps_;
    V bias_;
};

// Calls work(image, block) for every block of channels, those of a group in one task.
template <class Work>
void for_each_block(const famba_conv &p, const Blocks &blocks, const Work &work) {
    for_each(p.threads, p.batch * blocks.groups, [&](int64_t task) {
        const int64_t image = task / blocks.groups, group = task % blocks.groups;
        for (int64_t block = blocks.begin(group); block < blocks.begin(group + 1); ++block) work(image, block);
    });
}

template <class T, int WIDTH>
void conv_forward_of(const famba_conv &p) {
    for_each_block(p, Blocks(p.batch, p.channels), [&](int64_t image, int64_t block) {
        ConvBlock<T, WIDTH>(p, image, block).forward(Rows<T>(p.y, image));
    });
}

template <class T, int WIDTH>
void conv_backward_of(const famba_conv &p) {
    const Blocks blocks(p.batch, p.channels);
    const int64_t size = (p.width + 1) * W;
    float *partial = call_scratch.take(p.batch * blocks.count * size);
    for_each_block(p, blocks, [&](int64_t image, int64_t block) {
        float *own = partial + (image * blocks.count + block) * size;
        ConvBlock<T, WIDTH>(p, image, block).backward(Rows<const T>(p.dy, image), Rows<T>(p.dx, image), own);
    });
    for_each(p.threads, blocks.count, [&](int64_t block) {
        const int64_t channel = block * W;
        const int lanes = lanes_of(block, p.channels);
        for (int64_t k = 0; k <= p.width; ++k) {
            V total{};
            for (int64_t image = 0; image < p.batch; ++image)
                total += load(partial + (image * blocks.count + block) * size + k * W);
            if (k < p.width)
                for (int i = 0; i < lanes; ++i) p.dweight[(channel + i) * p.width + k] = total[i];
            else if (p.dbias)
                store(p.dbias + channel, total, lanes);
        }
    });
}

// The width of all Mamba models has code of its own.
template <class T>
void conv_forward(const famba_conv &p) {
    (p.width == 4 ? conv_forward_of<T, 4> : conv_forward_of<T, 0>)(p);
}

template <class T>
void conv_backward(const famba_conv &p) {
    (p.width == 4 ? conv_backward_of<T, 4> : conv_backward_of<T, 0>)(p);
}

}  // namespace FAMBA_ISA
}  // namespace famba
