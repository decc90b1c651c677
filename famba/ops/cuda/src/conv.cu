// The causal depthwise convolution: both directions of a mixer at once, or one.
//
// A thread owns LANES channels and walks over some steps of an image, with the steps that its taps see in registers.
// Constants: T (float, bf16, fp16), CHANNELS, X_ROW, DX_ROW (numbers from a row to the next), SILU, AHEAD and BACK (the
// directions that there are: causal, and mirrored); WIDTH (taps), LANES (2 where rows begin at even places, else 1).
#include "device.cuh"

constexpr int THREADS = 64, SEEN = 2 * WIDTH - 1;

// (b, l, d) and so on: batch b, length l, channels d. Of a direction that is not there pointers are not looked at.
struct Conv {
    const T *x;                              // (b, l, d)
    const float *weight[2], *bias[2];        // (d, WIDTH), (d) or null
    T *y[2];                                 // (b, l, d)
    const T *dy[2];                          // (b, l, d)
    T *dx;                                   // (b, l, d)
    float *partials;                         // (k, b chunks, WIDTH + 1, d), the second direction k at `second`
    long batch, length, chunks, second;
};

// LANES numbers that lie side by side in memory.
template <int N> struct Words;
template <> struct Words<2> { typedef unsigned short type; };
template <> struct Words<4> { typedef unsigned type; };
template <> struct Words<8> { typedef uint2 type; };
union Numbers {
    typedef Words<LANES * sizeof(T)>::type Word;
    Word word;
    T each[LANES];
};

DEVICE float value_of(float x) { return x; }
DEVICE float value_of(bf16 x) { return value(waiting_bf16{x.bits}); }
DEVICE float value_of(fp16 x) { return value(waiting_fp16{x.bits}); }

#define UNROLLED _Pragma("unroll") for
#define EACH_LANE UNROLLED (int i = 0; i < LANES; i++)

struct Vector {
    float at[LANES];

    DEVICE static Vector filled(float x) {
        Vector v;
        EACH_LANE v.at[i] = x;
        return v;
    }
    DEVICE static Vector read_from(const T *p) {
        Numbers numbers;
        numbers.word = read((const Numbers::Word *)p);
        Vector v;
        EACH_LANE v.at[i] = value_of(numbers.each[i]);
        return v;
    }
    DEVICE void write_to(T *p) const {
        Numbers numbers;
        EACH_LANE store(&numbers.each[i], at[i]);
        *(Numbers::Word *)p = numbers.word;
    }
    DEVICE void add_product(const Vector &a, const Vector &b) { EACH_LANE at[i] = fmaf(a.at[i], b.at[i], at[i]); }
    DEVICE void add(const Vector &a) { EACH_LANE at[i] += a.at[i]; }
    DEVICE void silu() { EACH_LANE at[i] *= sigmoid(at[i]); }
    DEVICE void times_slope_of_silu(const Vector &x) { EACH_LANE at[i] *= slope_of_silu(x.at[i]); }
};

// The last `COUNT` of some vectors.
template <int COUNT> struct Window {
    Vector at[COUNT] = {};

    DEVICE void push(const Vector &next) {
        UNROLLED (int i = 0; i + 1 < COUNT; i++) at[i] = at[i + 1];
        at[COUNT - 1] = next;
    }
};

// The steps and channels of a thread, and the kernel of each direction there.
struct Strip {
    int channel, begin, end, length;
    long image, chunk;
    Vector weight[2][WIDTH], bias[2];

    DEVICE explicit Strip(const Conv &conv) {
        const int blocks = (CHANNELS + THREADS * LANES - 1) / (THREADS * LANES);
        channel = (blockIdx.x % blocks * THREADS + threadIdx.x) * LANES;
        chunk = blockIdx.x / blocks;
        image = chunk / conv.chunks;
        length = conv.length;
        const int steps = (conv.length + conv.chunks - 1) / conv.chunks;
        begin = chunk % conv.chunks * steps;
        end = begin + steps < length ? begin + steps : length;
    }
    DEVICE bool is_outside() const { return channel >= CHANNELS; }
    DEVICE void read_kernels(const Conv &conv) {
        if (AHEAD) read_kernel(conv, 0);
        if (BACK) read_kernel(conv, 1);
    }
    DEVICE void read_kernel(const Conv &conv, int direction) {
        EACH_LANE {
            bias[direction].at[i] = conv.bias[direction] ? read(conv.bias[direction] + channel + i) : 0.f;
            UNROLLED (int k = 0; k < WIDTH; k++)
                weight[direction][k].at[i] = read(conv.weight[direction] + (channel + i) * WIDTH + k);
        }
    }
    DEVICE long place(int t, long row) const { return (image * length + t) * row + channel; }
    DEVICE Vector at(const T *p, int t, long row) const {
        return t >= 0 && t < length ? Vector::read_from(p + place(t, row)) : Vector::filled(0.f);
    }
    // The convolution whose first tap sees place `first` of a window, and the others what follows in steps of `step`.
    DEVICE Vector convolved(int direction, const Window<SEEN> &seen, int first, int step) const {
        Vector v = bias[direction];
        UNROLLED (int k = 0; k < WIDTH; k++) v.add_product(weight[direction][k], seen.at[first + k * step]);
        return v;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) conv_forward(const Conv conv) {
    Strip strip(conv);
    if (strip.is_outside()) return;
    strip.read_kernels(conv);
    // At step t place i holds step t - (WIDTH - 1) + i.
    Window<SEEN> seen;
    UNROLLED (int i = 1; i < SEEN; i++) seen.at[i] = strip.at(conv.x, strip.begin - WIDTH + i, X_ROW);
#pragma unroll SEEN
    for (int t = strip.begin; t < strip.end; t++) {
        seen.push(strip.at(conv.x, t + WIDTH - 1, X_ROW));
        const auto write = [&](int direction, int first, int step) {
            Vector v = strip.convolved(direction, seen, first, step);
            if (SILU) v.silu();
            v.write_to(conv.y[direction] + strip.place(t, CHANNELS));
        };
        if (AHEAD) write(0, 0, 1);
        if (BACK) write(1, SEEN - 1, -1);
    }
}

// The sums over a strip that are the gradients of a direction's kernel.
struct KernelSums {
    Vector weight[WIDTH] = {}, bias = {};

    DEVICE void add(const Vector &grad, const Window<SEEN> &seen, int first, int step) {
        UNROLLED (int k = 0; k < WIDTH; k++) weight[k].add_product(grad, seen.at[first + k * step]);
        bias.add(grad);
    }
    DEVICE void write_to(float *partials, const Strip &strip) const {
        partials += strip.chunk * (WIDTH + 1) * CHANNELS + strip.channel;
        EACH_LANE {
            UNROLLED (int k = 0; k < WIDTH; k++) partials[k * CHANNELS + i] = weight[k].at[i];
            partials[WIDTH * CHANNELS + i] = bias.at[i];
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) conv_backward(const Conv conv) {
    Strip strip(conv);
    if (strip.is_outside()) return;
    strip.read_kernels(conv);
    // At step t place i of `seen` holds step t - (WIDTH - 1) + i, of `ahead` t + i, of `back` t - (WIDTH - 1) + i: the
    // gradients, before silu, of all steps that have seen step t.
    Window<SEEN> seen;
    Window<WIDTH> ahead, back;
    KernelSums sums[2];
    UNROLLED (int i = 1; i < SEEN; i++) seen.at[i] = strip.at(conv.x, strip.begin - 2 * WIDTH + 1 + i, X_ROW);
#pragma unroll SEEN
    for (int t = strip.begin - WIDTH + 1; t < strip.end; t++) {
        const int later = t + WIDTH - 1;
        seen.push(strip.at(conv.x, later, X_ROW));
        if (AHEAD) {
            Vector grad = strip.at(conv.dy[0], later, CHANNELS);
            if (SILU) grad.times_slope_of_silu(strip.convolved(0, seen, WIDTH - 1, 1));
            ahead.push(grad);
            if (later >= strip.begin && later < strip.end) sums[0].add(grad, seen, WIDTH - 1, 1);
        }
        if (BACK) {
            Vector grad = strip.at(conv.dy[1], t, CHANNELS);
            if (SILU) grad.times_slope_of_silu(strip.convolved(1, seen, SEEN - 1, -1));
            back.push(grad);
            if (t >= strip.begin) sums[1].add(grad, seen, SEEN - 1, -1);
        }
        if (t < strip.begin) continue;
        Vector out = Vector::filled(0.f);
        UNROLLED (int k = 0; k < WIDTH; k++) {
            if (AHEAD) out.add_product(strip.weight[0][k], ahead.at[WIDTH - 1 - k]);
            if (BACK) out.add_product(strip.weight[1][k], back.at[k]);
        }
        out.write_to(conv.dx + strip.place(t, DX_ROW));
    }
    if (AHEAD) sums[0].write_to(conv.partials, strip);
    if (BACK) sums[1].write_to(conv.partials + (AHEAD ? conv.second : 0), strip);
}
