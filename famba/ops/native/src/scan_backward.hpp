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

struct BackwardSteps : Steps {
    float *u, *slope, *dy;    // dy is that before the gate
    float *ddrive, *ddelta;   // gathered over the states
};

// Channel blocks that share a line of memory.
template <class T>
constexpr int64_t TILE = 64 / (W * static_cast<int64_t>(sizeof(T)));

// Adds a step's products of G states to what channel blocks before have gathered. Four states at once share a vector:
// their lanes are added up as far as lanes of four go, so that memory sees a quarter of the traffic.
template <int G>
FAMBA_INLINE void gather(float *out, int64_t step, const V (&products)[G]) {
    if constexpr (G == 4) {
        store(out + step * W, load(out + step * W) + sum_fours(products));
    } else {
        for (int g = 0; g < G; ++g) {
            float *there = out + (step * G + g) * W;
            store(there, load(there) + products[g]);
        }
    }
}

template <int G>
FAMBA_INLINE void return_group(const BackwardSteps steps, int64_t count, const Group m, int64_t states) {
    V carry[G], dA[G];
    for (int g = 0; g < G; ++g) {
        carry[g] = load(m.carry + g * W);
        dA[g] = load(m.dA + g * W);
    }
    for (int64_t s = count - 1; s >= 0; --s) {
        const int64_t here = s * G * W, next = here + G * W;
        const V delta = load(steps.delta + s * W), drive = load(steps.drive + s * W), dy = load(steps.dy + s * W);
        V ddrive = load(steps.ddrive + s * W), ddelta = load(steps.ddelta + s * W);
        V products[G];
        for (int g = 0; g < G; ++g) products[g] = dy * load(m.h + next + g * W);
        gather<G>(m.dC, s, products);
        for (int g = 0; g < G; ++g) carry[g] += dy * m.C[s * states + g];
        for (int g = 0; g < G; ++g) ddrive += carry[g] * m.B[s * states + g];
        for (int g = 0; g < G; ++g) products[g] = carry[g] * drive;
        gather<G>(m.dB, s, products);
        for (int g = 0; g < G; ++g) {
            carry[g] *= load(m.decay + here + g * W);
            const V dexponent = carry[g] * load(m.h + here + g * W);
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
        : p_(scan), rates_(rates), blocks_(blocks), partial_(partial), image_(task / blocks.groups),
          group_(task % blocks.groups), first_(blocks.begin(group_)), last_(blocks.begin(group_ + 1)),
          u_(scan.u, image_), delta_(scan.delta, image_), z_(scan.z, image_), dy_(scan.dy, image_),
          y_(scan.y, image_), du_(scan.du, image_), ddelta_(scan.ddelta, image_), dz_(scan.dz, image_) {
        const int64_t n = p_.states, chunk = std::min(p_.chunk, p_.length), line = chunk * W;
        const int64_t gathered = line * (n / BACKWARD_GROUP + n % BACKWARD_GROUP);
        float *steps;
        carve(task_scratch,
              {chunk * n, chunk * n, (last_ - first_) * n * W, n * W, gathered, gathered, line * BACKWARD_GROUP,
               (line + W) * BACKWARD_GROUP, TILE<T> * 8 * line},
              {&B_, &C_, &carries_, &entering_, &dB_, &dC_, &decay_, &h_, &steps});
        for (int64_t i = 0; i < TILE<T>; ++i, steps += 8 * line)
            steps_[i] = {{steps + line, steps + 3 * line, steps + 5 * line}, steps, steps + 2 * line,
                         steps + 4 * line, steps + 6 * line, steps + 7 * line};
        std::fill(carries_, carries_ + (last_ - first_) * n * W, 0.f);
    }

    void run() {
        const int64_t chunks = (p_.length + p_.chunk - 1) / p_.chunk, n = p_.states;
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            const int64_t begin = chunk * p_.chunk, count = std::min(p_.length - begin, p_.chunk);
            const int64_t gathered = count * W * (n / BACKWARD_GROUP + n % BACKWARD_GROUP);
            gather_states<1>(B_, Rows<const T>(p_.B, image_), begin, count, p_);
            gather_states<1>(C_, Rows<const T>(p_.C, image_), begin, count, p_);
            std::fill(dB_, dB_ + gathered, 0.f);
            std::fill(dC_, dC_ + gathered, 0.f);
            for (int64_t block = first_; block < last_; block += TILE<T>) {
                const int64_t tile = std::min(TILE<T>, last_ - block);
                V most[TILE<T>];
                enter(begin, count, block, tile, most);
                for (int64_t i = 0; i < tile; ++i) run_block(block + i, steps_[i], most[i], chunk, chunks, count);
                leave(begin, count, block, tile, chunk == chunks - 1);
            }
            const int64_t rows = ((image_ * blocks_.groups + group_) * p_.length + begin) * n;
            add_lanes(partial_.dB + rows, dB_, count);
            add_lanes(partial_.dC + rows, dC_, count);
        }
    }

  private:
    void run_block(int64_t block, const BackwardSteps &steps, V most, int64_t chunk, int64_t chunks, int64_t count) {
        const int64_t channel = block * W, n = p_.states;
        if (chunk)
            load_states(entering_, p_.state + (image_ * (chunks - 1) + chunk - 1) * p_.channels * n, channel,
                        lanes(block), n);
        else
            std::fill(entering_, entering_ + n * W, 0.f);
        float *dA = partial_.dA + (image_ * blocks_.count + block) * n * W;
        if (chunk == chunks - 1) std::fill(dA, dA + n * W, 0.f);
        const bool safe = is_safe(most, rates_.largest[block]);
        Group m{h_, decay_, rates_.of(block), B_, C_, carries_ + (block - first_) * n * W, dA, dB_, dC_};
        const float *entering = entering_;
        const auto advance = [&](int64_t G) {
            m.carry += G * W, m.dA += G * W, m.rates += G * W, entering += G * W;
            m.B += G, m.C += G;
            m.dB += count * W, m.dC += count * W;
        };
        int64_t state = 0;
        for (; state + BACKWARD_GROUP <= n; state += BACKWARD_GROUP, advance(BACKWARD_GROUP))
            run_group<BACKWARD_GROUP>(steps, entering, count, safe, m);
        for (; state < n; ++state, advance(1)) run_group<1>(steps, entering, count, safe, m);
    }

    template <int G>
    void run_group(const BackwardSteps &steps, const float *entering, int64_t count, bool safe, const Group &m) {
        std::copy(entering, entering + G * W, m.h);
        if (safe)
            run_states<G, true, 1, true>(steps, count, m, p_.states);
        else
            run_states<G, false, 1, true>(steps, count, m, p_.states);
        return_group<G>(steps, count, m, p_.states);
    }

    int lanes(int64_t block) const { return lanes_of(block, p_.channels); }

    // Blocks whose numbers share lines of memory are read and written together. `most` is each block's largest
    // magnitude of delta.
    void enter(int64_t begin, int64_t count, int64_t first, int64_t tile, V *most) {
        if (tile == TILE<T>) return enter_blocks<TILE<T>>(begin, count, first, steps_, most);
        for (int64_t i = 0; i < tile; ++i) enter_blocks<1>(begin, count, first + i, steps_ + i, most + i);
    }

    // What does not change from step to step is copied first, for the reason given at run_states.
    template <int64_t N>
    void enter_blocks(int64_t begin, int64_t count, int64_t first, const BackwardSteps *steps_of, V *most_of) const {
        const int64_t channel = first * W;
        const int lanes = this->lanes(first + N - 1);
        const famba_scan p = p_;
        const Rows<const T> u_rows = u_, delta_rows = delta_, dy_rows = dy_, z_rows = z_;
        BackwardSteps steps[N];
        V bias[N], skip[N], most[N];
        for (int64_t i = 0; i < N; ++i) {
            steps[i] = steps_of[i];
            bias[i] = p.delta_bias ? load(p.delta_bias + channel + i * W, i + 1 < N ? W : lanes) : V{};
            skip[i] = p.D ? load(p.D + channel + i * W, i + 1 < N ? W : lanes) : V{};
            most[i] = V{};
        }
        for (int64_t s = 0; s < count; ++s) {
            const int64_t t = position(p, begin + s), ahead = row_ahead(p, begin, s, count), here = s * W;
            __builtin_prefetch(u_rows.at(ahead, channel));
            __builtin_prefetch(delta_rows.at(ahead, channel));
            __builtin_prefetch(dy_rows.at(ahead, channel));
            if (z_rows) __builtin_prefetch(z_rows.at(ahead, channel));
            for (int64_t i = 0; i < N; ++i) {
                const int64_t from = channel + i * W;
                const int width = i + 1 < N ? W : lanes;
                const V u = load(u_rows.at(t, from), width);
                Sloped delta{load(delta_rows.at(t, from), width) + bias[i], splat(1.f)};
                if (p.softplus) delta = softplus_with_slope(delta.value);
                V dy = load(dy_rows.at(t, from), width) * p.scale;
                if (z_rows) dy *= silu(load(z_rows.at(t, from), width));
                store(steps[i].u + here, u);
                store(steps[i].delta + here, delta.value);
                store(steps[i].slope + here, delta.slope);
                store(steps[i].drive + here, delta.value * u);
                store(steps[i].dy + here, dy);
                store(steps[i].y + here, skip[i] * u);
                store(steps[i].ddrive + here, V{});
                store(steps[i].ddelta + here, V{});
                most[i] = maximum(absolute(delta.value), most[i]);
            }
        }
        for (int64_t i = 0; i < N; ++i) most_of[i] = most[i];
    }

    void leave(int64_t begin, int64_t count, int64_t first, int64_t tile, bool last) {
        if (tile == TILE<T>) return leave_blocks<TILE<T>>(begin, count, first, steps_, last);
        for (int64_t i = 0; i < tile; ++i) leave_blocks<1>(begin, count, first + i, steps_ + i, last);
    }

    template <int64_t N>
    void leave_blocks(int64_t begin, int64_t count, int64_t first, const BackwardSteps *steps_of, bool last) const {
        const int64_t channel = first * W, place = (image_ * blocks_.count + first) * W;
        const int lanes = this->lanes(first + N - 1);
        const famba_scan p = p_;
        const Outputs out{Rows<const T>(dy_), Rows<const T>(z_), y_, du_, ddelta_, dz_, p.accumulate != 0};
        BackwardSteps steps[N];
        V skip[N], dD[N], dbias[N];
        for (int64_t i = 0; i < N; ++i) {
            steps[i] = steps_of[i];
            skip[i] = p.D ? load(p.D + channel + i * W, i + 1 < N ? W : lanes) : V{};
            dD[i] = last ? V{} : load(partial_.dD + place + i * W);
            dbias[i] = last ? V{} : load(partial_.dbias + place + i * W);
        }
        for (int64_t s = 0; s < count; ++s) {
            const int64_t t = position(p, begin + s), ahead = row_ahead(p, begin, s, count), here = s * W;
            __builtin_prefetch(out.du.at(ahead, channel), 1);
            __builtin_prefetch(out.ddelta.at(ahead, channel), 1);
            if (out.z) __builtin_prefetch(out.dz.at(ahead, channel), 1);
            for (int64_t i = 0; i < N; ++i) {
                const int64_t to = channel + i * W;
                const int width = i + 1 < N ? W : lanes;
                const V u = load(steps[i].u + here), dy = load(steps[i].dy + here);
                const V ddrive = load(steps[i].ddrive + here);
                const V ddelta = (load(steps[i].ddelta + here) * LN2 + ddrive * u) * load(steps[i].slope + here);
                dD[i] += dy * u;
                dbias[i] += ddelta;
                store(out.du.at(t, to), ddrive * load(steps[i].delta + here) + skip[i] * dy, width);
                store(out.ddelta.at(t, to), ddelta, width);
                out.gate(t, to, width, load(steps[i].y + here) * p.scale);
            }
        }
        for (int64_t i = 0; i < N; ++i) {
            store(partial_.dD + place + i * W, dD[i]);
            store(partial_.dbias + place + i * W, dbias[i]);
        }
    }

    // Where results go, and the gate between the scan and them.
    struct Outputs {
        Rows<const T> dy, z;
        Rows<T> y, du, ddelta, dz;
        bool accumulate;

        FAMBA_INLINE void gate(int64_t t, int64_t channel, int lanes, V value) const {
            if (z) {
                const Sloped by = silu_with_slope(load(z.at(t, channel), lanes));
                put(dz.at(t, channel), load(dy.at(t, channel), lanes) * value * by.slope, lanes);
                if (y) put(y.at(t, channel), value * by.value, lanes);
            } else if (y) {
                put(y.at(t, channel), value, lanes);
            }
        }

        FAMBA_INLINE void put(T *to, V value, int lanes) const {
            if (accumulate) value += load(to, lanes);
            store(to, value, lanes);
        }
    };

    // Sums over the lanes of what groups of states gathered, into (count, states).
    void add_lanes(float *out, const float *gathered, int64_t count) const {
        int64_t state = 0;
        for (; state + BACKWARD_GROUP <= p_.states; state += BACKWARD_GROUP, gathered += count * W)
            for (int64_t s = 0; s < count; ++s)
                for (int g = 0; g < BACKWARD_GROUP; ++g) {
                    float total = 0.f;
                    for (int lane = g; lane < W; lane += 4) total += gathered[s * W + lane];
                    out[s * p_.states + state + g] = total;
                }
        for (; state < p_.states; ++state, gathered += count * W)
            for (int64_t s = 0; s < count; ++s) out[s * p_.states + state] = sum(load(gathered + s * W));
    }

    const famba_scan &p_;
    const Rates &rates_;
    const Blocks &blocks_;
    const Partial &partial_;
    int64_t image_, group_, first_, last_;
    Rows<const T> u_, delta_, z_, dy_;
    Rows<T> y_, du_, ddelta_, dz_;
    float *B_, *C_, *carries_, *entering_, *dB_, *dC_, *decay_, *h_;
    BackwardSteps steps_[TILE<T>];
};

// Adds the images' gradients of A, D and the bias for one channel block.
inline void add_images(const famba_scan &p, const Blocks &blocks, const Partial &partial, int64_t block) {
    const int64_t channel = block * W, n = p.states;
    const int lanes = lanes_of(block, p.channels);
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
    carve(call_scratch,
          {blocks.count * p.states * W, blocks.count, per_channel * p.states, per_channel, per_channel, per_step, per_step},
          {&rates.vectors, &rates.largest, &partial.dA, &partial.dD, &partial.dbias, &partial.dB, &partial.dC});
    rates.fill(p, blocks);
    if (p.length == 0) {
        std::fill(partial.dA, partial.dA + per_channel * p.states, 0.f);
        std::fill(partial.dD, partial.dD + per_channel, 0.f);
        std::fill(partial.dbias, partial.dbias + per_channel, 0.f);
    }
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
