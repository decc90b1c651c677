// The gradients of the selective scan.
//
// Chunks of steps are taken from the last to the first, and in each chunk all channel blocks of the task in turn. For a
// group of states, a first pass along the chunk recomputes decays and states into scratch, a second pass runs back over
// them. Gradients of B and C, sums over channels, are gathered as vectors and their lanes added once for each chunk;
// those of A, D and the bias, sums over images, are kept for each image and added at the end. Both in a fixed order.
#pragma once

#include "scan.hpp"

namespace famba {
namespace FAMBA_ISA {

// What tasks leave for the sums at the end of a call.
struct Partial {
    float *dA, *dD, *dbias;  // (batch, blocks, states, W), (batch, blocks, W) twice
    float *dB, *dC;          // (batch, groups, length, states), in the order of the scan
};

struct BackwardSteps {
    float *u, *delta, *slope, *drive, *dy;  // of a chunk, one vector for each step; dy is that before the gate
    float *y, *ddrive, *ddelta;             // gathered over the states
};

struct GroupMemory {
    float *decay, *h;    // (count, G, W), (count + 1, G, W)
    float *carry, *dA;   // (G, W): the gradient of the chunk's last states, and of A
    const float *rates;  // (G, W)
    const float *B, *C;  // (count, states) from the group's first
    float *dB, *dC;      // (count, G, W)
};

template <int G, bool Safe>
FAMBA_INLINE void recompute_group(const BackwardSteps &steps, int64_t count, const GroupMemory &m, int64_t states) {
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
        for (int g = 0; g < G; ++g) store(m.decay + (s * G + g) * W, decay[g]);
        for (int g = 0; g < G; ++g) h[g] = decay[g] * h[g] + drive * m.B[s * states + g];
        for (int g = 0; g < G; ++g) store(m.h + ((s + 1) * G + g) * W, h[g]);
        for (int g = 0; g < G; ++g) y += h[g] * m.C[s * states + g];
        store(steps.y + s * W, y);
    }
}

template <int G>
FAMBA_INLINE void return_group(const BackwardSteps &steps, int64_t count, const GroupMemory &m, int64_t states) {
    V carry[G], dA[G];
    for (int g = 0; g < G; ++g) {
        carry[g] = load(m.carry + g * W);
        dA[g] = load(m.dA + g * W);
    }
    for (int64_t s = count - 1; s >= 0; --s) {
        const V delta = load(steps.delta + s * W), drive = load(steps.drive + s * W), dy = load(steps.dy + s * W);
        V ddrive = load(steps.ddrive + s * W), ddelta = load(steps.ddelta + s * W);
        for (int g = 0; g < G; ++g) {
            const int64_t here = (s * G + g) * W;
            const V dh = dy * m.C[s * states + g] + carry[g];
            store(m.dC + here, load(m.dC + here) + dy * load(m.h + here + G * W));
            store(m.dB + here, load(m.dB + here) + dh * drive);
            ddrive += dh * m.B[s * states + g];
            carry[g] = dh * load(m.decay + here);
            const V dexponent = carry[g] * load(m.h + here);
            ddelta += dexponent * load(m.rates + g * W);
            dA[g] += dexponent * delta;
        }
        store(steps.ddrive + s * W, ddrive);
        store(steps.ddelta + s * W, ddelta);
    }
    for (int g = 0; g < G; ++g) {
        store(m.carry + g * W, carry[g]);
        store(m.dA + g * W, dA[g]);
    }
}

template <class T>
class BackwardTask {
  public:
    BackwardTask(const famba_scan &scan, const Rates &rates, const Blocks &blocks, const Partial &partial, int64_t task)
        : p_(scan), rates_(rates), blocks_(blocks), partial_(partial), image_(task / blocks.groups), group_(task % blocks.groups),
          u_(scan.u, image_), delta_(scan.delta, image_), z_(scan.z, image_), dy_(scan.dy, image_),
          y_(scan.y, image_), du_(scan.du, image_), ddelta_(scan.ddelta, image_), dz_(scan.dz, image_) {
        const int64_t n = p_.states, chunk = std::min(p_.chunk, p_.length), line = chunk * W;
        const int64_t mine = blocks_.begin(group_ + 1) - blocks_.begin(group_);
        carve(task_scratch(),
              {chunk * n, chunk * n, mine * n * W, n * W, line * n, line * n, line * BACKWARD_GROUP,
               (line + W) * BACKWARD_GROUP, line, line, line, line, line, line, line, line},
              {&B_, &C_, &carries_, &entering_, &dB_, &dC_, &decay_, &h_, &steps_.u, &steps_.delta,
               &steps_.slope, &steps_.drive, &steps_.dy, &steps_.y, &steps_.ddrive, &steps_.ddelta});
        std::fill(carries_, carries_ + mine * n * W, 0.f);
    }

    void run() {
        const int64_t chunks = (p_.length + p_.chunk - 1) / p_.chunk;
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            const int64_t begin = chunk * p_.chunk, count = std::min(p_.length - begin, p_.chunk);
            gather_states(B_, Rows<const T>(p_.B, image_), begin, count, p_);
            gather_states(C_, Rows<const T>(p_.C, image_), begin, count, p_);
            std::fill(dB_, dB_ + count * p_.states * W, 0.f);
            std::fill(dC_, dC_ + count * p_.states * W, 0.f);
            for (int64_t block = blocks_.begin(group_); block < blocks_.begin(group_ + 1); ++block)
                run_block(block, chunk, chunks, begin, count);
            const int64_t rows = ((image_ * blocks_.groups + group_) * p_.length + begin) * p_.states;
            add_lanes(partial_.dB + rows, dB_, count);
            add_lanes(partial_.dC + rows, dC_, count);
        }
    }

  private:
    void run_block(int64_t block, int64_t chunk, int64_t chunks, int64_t begin, int64_t count) {
        const int64_t channel = block * W, n = p_.states;
        const int lanes = static_cast<int>(std::min<int64_t>(W, p_.channels - channel));
        if (chunk)
            load_states(entering_, p_.state + (image_ * (chunks - 1) + chunk - 1) * p_.channels * n, channel, lanes, n);
        else
            std::fill(entering_, entering_ + n * W, 0.f);
        const bool last = chunk == chunks - 1;
        const int64_t place = image_ * blocks_.count + block;
        float *dA = partial_.dA + place * n * W, *dD = partial_.dD + place * W, *dbias = partial_.dbias + place * W;
        if (last) {
            std::fill(dA, dA + n * W, 0.f);
            std::fill(dD, dD + W, 0.f);
            std::fill(dbias, dbias + W, 0.f);
        }
        const bool safe = is_safe(enter(begin, count, channel, lanes), rates_.largest[block]);
        float *carry = carries_ + (block - blocks_.begin(group_)) * n * W;
        int64_t first = 0;
        for (; first + BACKWARD_GROUP <= n; first += BACKWARD_GROUP)
            run_group<BACKWARD_GROUP>(rates_.of(block), first, count, safe, carry, dA);
        for (; first < n; ++first) run_group<1>(rates_.of(block), first, count, safe, carry, dA);
        leave(begin, count, channel, lanes, dD, dbias);
    }

    template <int G>
    void run_group(const float *rates, int64_t first, int64_t count, bool safe, float *carry, float *dA) {
        const int64_t lanes_before = first * W;
        std::copy(entering_ + lanes_before, entering_ + lanes_before + G * W, h_);
        // A group's gradients of B and C lie together, so that each pass runs through memory in one stream.
        const GroupMemory m{decay_,
                            h_,
                            carry + lanes_before,
                            dA + lanes_before,
                            rates + lanes_before,
                            B_ + first,
                            C_ + first,
                            dB_ + lanes_before * count,
                            dC_ + lanes_before * count};
        if (safe)
            recompute_group<G, true>(steps_, count, m, p_.states);
        else
            recompute_group<G, false>(steps_, count, m, p_.states);
        return_group<G>(steps_, count, m, p_.states);
    }

    // Returns the largest magnitude of delta.
    V enter(int64_t begin, int64_t count, int64_t channel, int lanes) {
        const V bias = p_.delta_bias ? load(p_.delta_bias + channel, lanes) : V{};
        const V skip = p_.D ? load(p_.D + channel, lanes) : V{};
        V most{};
        for (int64_t s = 0; s < count; ++s) {
            const int64_t t = position(p_, begin + s);
            const V u = load(u_.at(t, channel), lanes);
            Softplus delta{load(delta_.at(t, channel), lanes) + bias, splat(1.f)};
            if (p_.softplus) delta = softplus_with_slope(delta.value);
            V dy = load(dy_.at(t, channel), lanes) * p_.scale;
            if (z_) {
                const V z = load(z_.at(t, channel), lanes);
                dy *= z * sigmoid(z);
            }
            most = maximum(absolute(delta.value), most);
            store(steps_.u + s * W, u);
            store(steps_.delta + s * W, delta.value);
            store(steps_.slope + s * W, delta.slope);
            store(steps_.drive + s * W, delta.value * u);
            store(steps_.dy + s * W, dy);
            store(steps_.y + s * W, skip * u);
            store(steps_.ddrive + s * W, V{});
            store(steps_.ddelta + s * W, V{});
        }
        return most;
    }

    void leave(int64_t begin, int64_t count, int64_t channel, int lanes, float *dD_memory, float *dbias_memory) {
        const V skip = p_.D ? load(p_.D + channel, lanes) : V{};
        V dD = load(dD_memory), dbias = load(dbias_memory);
        for (int64_t s = 0; s < count; ++s) {
            const int64_t t = position(p_, begin + s);
            const V u = load(steps_.u + s * W), dy = load(steps_.dy + s * W), ddrive = load(steps_.ddrive + s * W);
            const V from_rates = load(steps_.ddelta + s * W) * LN2;
            const V ddelta = (from_rates + ddrive * u) * load(steps_.slope + s * W);
            dD += dy * u;
            dbias += ddelta;
            store(du_.at(t, channel), ddrive * load(steps_.delta + s * W) + skip * dy, lanes);
            store(ddelta_.at(t, channel), ddelta, lanes);
            const V y = load(steps_.y + s * W) * p_.scale;
            if (z_) leave_gate(t, channel, lanes, y);
            else if (y_) put(y_.at(t, channel), y, lanes);
        }
        store(dD_memory, dD);
        store(dbias_memory, dbias);
    }

    void leave_gate(int64_t t, int64_t channel, int lanes, V y) {
        const V z = load(z_.at(t, channel), lanes), gate = sigmoid(z);
        const V slope = gate * (1.f + z * (1.f - gate));
        put(dz_.at(t, channel), load(dy_.at(t, channel), lanes) * y * slope, lanes);
        if (y_) put(y_.at(t, channel), y * z * gate, lanes);
    }

    void put(T *out, V value, int lanes) {
        if (p_.accumulate) value += load(out, lanes);
        store(out, value, lanes);
    }

    // Sums over the lanes of what groups of states gathered, into (count, states).
    void add_lanes(float *out, const float *gathered, int64_t count) {
        int64_t first = 0;
        const auto group = [&](int64_t G) {
            for (int64_t s = 0; s < count; ++s)
                for (int64_t g = 0; g < G; ++g)
                    out[s * p_.states + first + g] = sum(load(gathered + (first * count + s * G + g) * W));
            first += G;
        };
        while (first + BACKWARD_GROUP <= p_.states) group(BACKWARD_GROUP);
        while (first < p_.states) group(1);
    }

    const famba_scan &p_;
    const Rates &rates_;
    const Blocks &blocks_;
    const Partial &partial_;
    int64_t image_, group_;
    Rows<const T> u_, delta_, z_, dy_;
    Rows<T> y_, du_, ddelta_, dz_;
    float *B_, *C_, *carries_, *entering_, *dB_, *dC_, *decay_, *h_;
    BackwardSteps steps_;
};

// Adds the images' gradients of A, D and the bias for one channel block.
inline void add_images(const famba_scan &p, const Blocks &blocks, const Partial &partial, int64_t block) {
    const int64_t channel = block * W, n = p.states;
    const int lanes = static_cast<int>(std::min<int64_t>(W, p.channels - channel));
    const auto total = [&](const float *part, int64_t stride) {
        V x{};
        for (int64_t image = 0; image < p.batch; ++image) x += load(part + image * stride);
        return x;
    };
    for (int64_t state = 0; state < n; ++state) {
        const V dA = total(partial.dA + (block * n + state) * W, blocks.count * n * W);
        for (int i = 0; i < lanes; ++i) p.dA[(channel + i) * n + state] = dA[i];
    }
    if (p.dD) store(p.dD + channel, total(partial.dD + block * W, blocks.count * W), lanes);
    if (p.ddelta_bias) store(p.ddelta_bias + channel, total(partial.dbias + block * W, blocks.count * W), lanes);
}

// Adds what the channel groups of an image gathered for B or C.
template <class T>
void add_groups(const famba_scan &p, const Blocks &blocks, const float *partial, const famba_array &out, int64_t image) {
    const Rows<T> rows(out, image);
    const int64_t size = p.length * p.states;
    partial += image * blocks.groups * size;
    for (int64_t s = 0; s < p.length; ++s)
        for (int64_t n = 0; n < p.states; ++n) {
            float x = 0.f;
            for (int64_t group = 0; group < blocks.groups; ++group) x += partial[group * size + s * p.states + n];
            store_one(rows.at(position(p, s), n), x);
        }
}

template <class T>
void scan_backward(const famba_scan &p) {
    const Blocks blocks(p.batch, p.channels);
    Rates rates;
    Partial partial;
    const int64_t per_channel = p.batch * blocks.count * W, per_step = p.batch * blocks.groups * p.length * p.states;
    carve(call_scratch(),
          {blocks.count * p.states * W, blocks.count, per_channel * p.states, per_channel, per_channel, per_step, per_step},
          {&rates.vectors, &rates.largest, &partial.dA, &partial.dD, &partial.dbias, &partial.dB, &partial.dC});
    rates.fill(p, blocks);
    for_each(p.threads, p.batch * blocks.groups, [&](int64_t task) {
        const FlushDenormals flush;
        BackwardTask<T>(p, rates, blocks, partial, task).run();
    });
    for_each(p.threads, p.batch, [&](int64_t image) {
        add_groups<T>(p, blocks, partial.dB, p.dB, image);
        add_groups<T>(p, blocks, partial.dC, p.dC, image);
    });
    for_each(p.threads, blocks.count, [&](int64_t block) { add_images(p, blocks, partial, block); });
}

}  // namespace FAMBA_ISA
}  // namespace famba
