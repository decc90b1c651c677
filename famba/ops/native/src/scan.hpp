// The selective scan. Lanes hold channels, so the recurrence runs along the length in plain vector arithmetic.
//
// A task is one image and a range of channel blocks (W channels each). States are worked on in groups of a few that
// stay in registers while the scan runs along a chunk of steps; the chunk's inputs are in scratch, as float32 and in
// the order of the scan. Step s of a reversed scan is position length - 1 - s.
#pragma once

#include <algorithm>

#include "parallel.hpp"
#include "simd.hpp"

namespace famba {
namespace FAMBA_ISA {

// States in registers at once.
constexpr int FORWARD_GROUP = FAMBA_LANES == 16 ? 8 : 4, BACKWARD_GROUP = 4;

// Steps whose inputs fit a first-level cache in the forward.
constexpr int64_t FORWARD_STEPS = 32;

// Tasks that a call is cut into at least; not the number of threads, so that results do not depend on it.
constexpr int64_t TASKS = 16;

template <class T>
struct Rows {
    T *data;
    int64_t stride;

    Rows(const famba_array &array, int64_t image)
        : data(array.data ? static_cast<T *>(array.data) + image * array.batch_stride : nullptr),
          stride(array.row_stride) {}
    explicit operator bool() const { return data != nullptr; }
    T *at(int64_t row, int64_t channel) const { return data + row * stride + channel; }
};

struct Blocks {
    int64_t count, groups;

    Blocks(int64_t batch, int64_t channels)
        : count((channels + W - 1) / W),
          groups(std::max<int64_t>(1, std::min(count, (TASKS + batch - 1) / std::max<int64_t>(1, batch)))) {}
    int64_t begin(int64_t group) const { return count * group / groups; }
};

// The lanes of a block that hold channels: the last may have less than W.
FAMBA_INLINE int lanes_of(int64_t block, int64_t channels) {
    return static_cast<int>(std::min<int64_t>(W, channels - block * W));
}

// The position of a step.
template <class Params>
FAMBA_INLINE int64_t position(const Params &p, int64_t step) {
    return p.reverse ? p.length - 1 - step : step;
}

// The row to ask memory for while step `s` of `count` is worked on: the stride is too long for a processor to foresee.
FAMBA_INLINE int64_t row_ahead(const famba_scan &p, int64_t begin, int64_t s, int64_t count) {
    return position(p, begin + std::min(s + 12, count - 1));
}

// B or C of some steps of an image in the order of the scan, (count, states), each number `Times` times.
template <int Times, class T>
void gather_states(float *out, const Rows<T> &rows, int64_t begin, int64_t count, const famba_scan &p) {
    for (int64_t s = 0; s < count; ++s) {
        const T *row = rows.at(position(p, begin + s), 0);
        for (int64_t n = 0; n < p.states; ++n)
            for (int i = 0; i < Times; ++i) out[(s * p.states + n) * Times + i] = load_one(row + n);
    }
}

// In the forward, where the instruction set cannot take a number from memory for all lanes as an operand, B and C are
// spread out to vectors beforehand.
constexpr int SPREAD = FAMBA_LANES == 16 ? 1 : W;

// A coefficient of a step for all lanes.
template <int Spread>
FAMBA_INLINE V coefficient(const float *spread, int64_t index) {
    return Spread == 1 ? splat(spread[index]) : load(spread + index * W);
}

// A times log2(e) as vectors, (blocks, states, W), and the largest magnitude in each block.
struct Rates {
    float *vectors, *largest;
    int64_t states;

    const float *of(int64_t block) const { return vectors + block * states * W; }

    void fill(const famba_scan &p, const Blocks &blocks) {
        states = p.states;
        for (int64_t block = 0; block < blocks.count; ++block) {
            const int lanes = lanes_of(block, p.channels);
            V most{};
            for (int64_t n = 0; n < states; ++n) {
                V a{};
                for (int i = 0; i < lanes; ++i) a[i] = p.A[(block * W + i) * states + n];
                a *= LOG2E;
                store(vectors + (block * states + n) * W, a);
                most = maximum(absolute(a), most);
            }
            largest[block] = famba::FAMBA_ISA::largest(most);
        }
    }
};

// Where the inputs of a chunk of steps lie, one vector for each step.
struct Steps {
    float *delta, *drive, *y;
};

// What G states read and write along a chunk of steps.
struct Group {
    float *h, *decay;        // (G, W), or to keep what each step makes of it (count + 1, G, W); (count, G, W) then
    const float *rates;      // (G, W)
    const float *B, *C;      // (count, states, Spread) from the group's first
    float *carry, *dA;       // backward: (G, W), the gradient of the chunk's last states, and of A
    float *dB, *dC;          // backward: (count, W), as `gather` leaves them
};

// Runs G states along `count` steps: h = 2^(delta A) h + drive B, y += C h.
// Structures by value: where their address is known, a store of floats might change them, and every use loads them
// again.
template <int G, bool Safe, int Spread, bool Keep>
FAMBA_INLINE void run_states(const Steps steps, int64_t count, const Group m, int64_t states) {
    V h[G], rate[G];
    for (int g = 0; g < G; ++g) {
        h[g] = load(m.h + g * W);
        rate[g] = load(m.rates + g * W);
    }
    for (int64_t s = 0; s < count; ++s) {
        const V delta = load(steps.delta + s * W), drive = load(steps.drive + s * W);
        V y = load(steps.y + s * W);
        V decay[G];
        exp2_products<!Safe>(delta, rate, decay);
        for (int g = 0; Keep && g < G; ++g) store(m.decay + (s * G + g) * W, decay[g]);
        for (int g = 0; g < G; ++g) h[g] = decay[g] * h[g] + drive * coefficient<Spread>(m.B, s * states + g);
        for (int g = 0; Keep && g < G; ++g) store(m.h + ((s + 1) * G + g) * W, h[g]);
        for (int g = 0; g < G; ++g) y += h[g] * coefficient<Spread>(m.C, s * states + g);
        store(steps.y + s * W, y);
    }
    for (int g = 0; !Keep && g < G; ++g) store(m.h + g * W, h[g]);
}

template <bool Safe>
void forward_states(const Steps &steps, int64_t count, Group m, int64_t states) {
    const auto advance = [&](int64_t G) { m.h += G * W, m.rates += G * W, m.B += G * SPREAD, m.C += G * SPREAD; };
    int64_t n = 0;
    for (; n + FORWARD_GROUP <= states; n += FORWARD_GROUP, advance(FORWARD_GROUP))
        run_states<FORWARD_GROUP, Safe, SPREAD, false>(steps, count, m, states);
    for (; n < states; ++n, advance(1)) run_states<1, Safe, SPREAD, false>(steps, count, m, states);
}

// Whether 2^(delta A) needs no clamping, for the largest magnitudes of both.
FAMBA_INLINE bool is_safe(V largest_delta, float largest_rate) { return largest(largest_delta) * largest_rate < 125.f; }

FAMBA_INLINE void keep_states(float *out, const float *h, int64_t channel, int lanes, int64_t states) {
    for (int64_t n = 0; n < states; ++n)
        for (int i = 0; i < lanes; ++i) out[(channel + i) * states + n] = h[n * W + i];
}

FAMBA_INLINE void load_states(float *h, const float *kept, int64_t channel, int lanes, int64_t states) {
    for (int64_t n = 0; n < states; ++n)
        for (int i = 0; i < W; ++i) h[n * W + i] = i < lanes ? kept[(channel + i) * states + n] : 0.f;
}

template <class T>
class ForwardTask {
  public:
    // `sums`: for the measures of each task, (tasks, 2, length); or null.
    ForwardTask(const famba_scan &scan, const Rates &rates, const Blocks &blocks, float *sums, int64_t task)
        : p_(scan), rates_(rates), image_(task / blocks.groups), first_(blocks.begin(task % blocks.groups)),
          last_(blocks.begin(task % blocks.groups + 1)), u_(scan.u, image_), delta_(scan.delta, image_),
          z_(scan.z, image_), y_(scan.y, image_), sums_(sums ? sums + task * 2 * scan.length : nullptr) {
        const int64_t line = FORWARD_STEPS * W, n = p_.states;
        carve(task_scratch,
              {(last_ - first_) * n * W, FORWARD_STEPS * n * SPREAD, FORWARD_STEPS * n * SPREAD, line, line, line},
              {&h_, &B_, &C_, &steps_.delta, &steps_.drive, &steps_.y});
    }

    void run() {
        std::fill(h_, h_ + (last_ - first_) * p_.states * W, 0.f);
        if (sums_) std::fill(sums_, sums_ + 2 * p_.length, 0.f);
        for (int64_t begin = 0; begin < p_.length;) {
            const int64_t chunk = begin / p_.chunk;
            const int64_t count = std::min({FORWARD_STEPS, (chunk + 1) * p_.chunk - begin, p_.length - begin});
            gather_states<SPREAD>(B_, Rows<const T>(p_.B, image_), begin, count, p_);
            gather_states<SPREAD>(C_, Rows<const T>(p_.C, image_), begin, count, p_);
            for (int64_t block = first_; block < last_; ++block) run_block(block, begin, count);
            begin += count;
        }
    }

  private:
    void run_block(int64_t block, int64_t begin, int64_t count) {
        const int64_t channel = block * W, n = p_.states;
        const int lanes = lanes_of(block, p_.channels);
        float *h = h_ + (block - first_) * n * W;
        if (begin && begin % p_.chunk == 0) {
            const int64_t chunks = (p_.length + p_.chunk - 1) / p_.chunk;
            const int64_t kept = image_ * (chunks - 1) + begin / p_.chunk - 1;
            keep_states(p_.state + kept * p_.channels * n, h, channel, lanes, n);
        }
        const bool safe = is_safe(enter(begin, count, channel, lanes), rates_.largest[block]);
        const Group group{h, nullptr, rates_.of(block), B_, C_, nullptr, nullptr, nullptr, nullptr};
        (safe ? forward_states<true> : forward_states<false>)(steps_, count, group, n);
        leave(begin, count, channel, lanes);
    }

    // Returns the largest magnitude of delta.
    V enter(int64_t begin, int64_t count, int64_t channel, int lanes) {
        const V bias = p_.delta_bias ? load(p_.delta_bias + channel, lanes) : V{};
        const V skip = p_.D ? load(p_.D + channel, lanes) : V{};
        V most{};
        for (int64_t s = 0; s < count; ++s) {
            const int64_t t = position(p_, begin + s), ahead = row_ahead(p_, begin, s, count);
            __builtin_prefetch(u_.at(ahead, channel));
            __builtin_prefetch(delta_.at(ahead, channel));
            const V u = load(u_.at(t, channel), lanes);
            const V raw = load(delta_.at(t, channel), lanes) + bias, delta = p_.softplus ? softplus(raw) : raw;
            most = maximum(absolute(delta), most);
            if (sums_) sums_[t] += sum(delta, lanes);
            store(steps_.delta + s * W, delta);
            store(steps_.drive + s * W, delta * u);
            store(steps_.y + s * W, skip * u);
        }
        return most;
    }

    void leave(int64_t begin, int64_t count, int64_t channel, int lanes) {
        for (int64_t s = 0; s < count; ++s) {
            const int64_t t = position(p_, begin + s);
            V y = load(steps_.y + s * W);
            if (sums_) sums_[p_.length + t] += sum(maximum(splat(0.f), y), lanes);
            y *= p_.scale;
            if (z_) y *= silu(load(z_.at(t, channel), lanes));
            T *out = y_.at(t, channel);
            if (p_.accumulate) y += load(out, lanes);
            store(out, y, lanes);
        }
    }

    const famba_scan &p_;
    const Rates &rates_;
    int64_t image_, first_, last_;
    Rows<const T> u_, delta_, z_;
    Rows<T> y_;
    float *sums_, *h_, *B_, *C_;
    Steps steps_;
};

// Adds the measures that the channel groups of an image gathered.
inline void add_measures(const famba_scan &p, const Blocks &blocks, const float *sums, int64_t image) {
    for (int64_t t = 0; t < p.length; ++t) {
        float steps = 0.f, outputs = 0.f;
        for (int64_t task = image * blocks.groups; task < (image + 1) * blocks.groups; ++task) {
            steps += sums[task * 2 * p.length + t];
            outputs += sums[(task * 2 + 1) * p.length + t];
        }
        p.step_means[image * p.length + t] = steps / static_cast<float>(p.channels);
        p.output_sums[image * p.length + t] = outputs;
    }
}

template <class T>
void scan_forward(const famba_scan &p) {
    const Blocks blocks(p.batch, p.channels);
    Rates rates;
    float *sums;
    const int64_t measured = p.step_means ? p.batch * blocks.groups * 2 * p.length : 0;
    carve(call_scratch, {blocks.count * p.states * W, blocks.count, measured}, {&rates.vectors, &rates.largest, &sums});
    rates.fill(p, blocks);
    for_each(p.threads, p.batch * blocks.groups, [&](int64_t task) {
        const FlushDenormals flush;
        ForwardTask<T>(p, rates, blocks, p.step_means ? sums : nullptr, task).run();
    });
    if (p.step_means) for_each(p.threads, p.batch, [&](int64_t image) { add_measures(p, blocks, sums, image); });
}

}  // namespace FAMBA_ISA
}  // namespace famba
