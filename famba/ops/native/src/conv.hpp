// The causal depthwise convolution. Tap `width - 1` meets the position itself, earlier taps the steps before it.
#pragma once

#include "scan.hpp"

namespace famba {
namespace FAMBA_ISA {

// One image and one block of channels in the order of the convolution, x behind `width - 1` steps of zeros.
template <class T>
class ConvBlock {
  public:
    ConvBlock(const famba_conv &conv, int64_t image, int64_t block)
        : p_(conv), channel_(block * W), lanes_(static_cast<int>(std::min<int64_t>(W, conv.channels - channel_))),
          x_(conv.x, image) {
        const int64_t steps = (p_.length + p_.width - 1) * W;
        carve(task_scratch(), {steps, steps, p_.width * W}, {&inputs_, &grads_, &taps_});
        for (int64_t k = 0; k < p_.width; ++k) {
            V tap{};
            for (int i = 0; i < lanes_; ++i) tap[i] = p_.weight[(channel_ + i) * p_.width + k];
            store(taps_ + k * W, tap);
        }
        const int64_t pad = p_.width - 1;
        std::fill(inputs_, inputs_ + pad * W, 0.f);
        for (int64_t s = 0; s < p_.length; ++s)
            store(inputs_ + (s + pad) * W, load(x_.at(position(s), channel_), lanes_));
        bias_ = p_.bias ? load(p_.bias + channel_, lanes_) : V{};
    }

    void forward(const Rows<T> &out) const {
        for (int64_t s = 0; s < p_.length; ++s) {
            V y = bias_ + correlate(inputs_ + s * W);
            if (p_.silu) y = silu(y);
            store(out.at(position(s), channel_), y, lanes_);
        }
    }

    // Writes the input's gradient, and into `partial` (width + 1, W) those of the taps and the bias.
    void backward(const Rows<const T> &dy, const Rows<T> &dx, float *partial) const {
        const int64_t pad = p_.width - 1;
        V dbias{};
        for (int64_t s = 0; s < p_.length; ++s) {
            V grad = load(dy.at(position(s), channel_), lanes_);
            if (p_.silu) grad *= silu_with_slope(bias_ + correlate(inputs_ + s * W)).slope;
            dbias += grad;
            store(grads_ + s * W, grad);
        }
        std::fill(grads_ + p_.length * W, grads_ + (p_.length + pad) * W, 0.f);
        for (int64_t k = 0; k < p_.width; ++k) store(partial + k * W, tap_gradient(k));
        store(partial + p_.width * W, dbias);
        for (int64_t s = 0; s < p_.length; ++s) {
            V grad{};
            for (int64_t k = 0; k < p_.width; ++k) grad += load(grads_ + (s + pad - k) * W) * load(taps_ + k * W);
            T *out = dx.at(position(s), channel_);
            if (p_.accumulate) grad += load(out, lanes_);
            store(out, grad, lanes_);
        }
    }

  private:
    int64_t position(int64_t step) const { return p_.reverse ? p_.length - 1 - step : step; }

    V correlate(const float *window) const {
        V y{};
        for (int64_t k = 0; k < p_.width; ++k) y += load(window + k * W) * load(taps_ + k * W);
        return y;
    }

    V tap_gradient(int64_t k) const {
        V grad{};
        for (int64_t s = 0; s < p_.length; ++s) grad += load(grads_ + s * W) * load(inputs_ + (s + k) * W);
        return grad;
    }

    const famba_conv &p_;
    int64_t channel_;
    int lanes_;
    Rows<const T> x_;
    float *inputs_, *grads_, *taps_;
    V bias_;
};

template <class T>
void conv_forward(const famba_conv &p) {
    const Blocks blocks(p.batch, p.channels);
    for_each(p.threads, p.batch * blocks.groups, [&](int64_t task) {
        const int64_t image = task / blocks.groups, group = task % blocks.groups;
        for (int64_t block = blocks.begin(group); block < blocks.begin(group + 1); ++block)
            ConvBlock<T>(p, image, block).forward(Rows<T>(p.y, image));
    });
}

template <class T>
void conv_backward(const famba_conv &p) {
    const Blocks blocks(p.batch, p.channels);
    const int64_t size = (p.width + 1) * W;
    float *partial = call_scratch().take(p.batch * blocks.count * size);
    for_each(p.threads, p.batch * blocks.groups, [&](int64_t task) {
        const int64_t image = task / blocks.groups, group = task % blocks.groups;
        for (int64_t block = blocks.begin(group); block < blocks.begin(group + 1); ++block)
            ConvBlock<T>(p, image, block)
                .backward(Rows<const T>(p.dy, image), Rows<T>(p.dx, image),
                          partial + (image * blocks.count + block) * size);
    });
    for_each(p.threads, blocks.count, [&](int64_t block) {
        const int64_t channel = block * W;
        const int lanes = static_cast<int>(std::min<int64_t>(W, p.channels - channel));
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

}  // namespace FAMBA_ISA
}  // namespace famba
