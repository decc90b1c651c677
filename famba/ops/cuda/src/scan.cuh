// What the kernels of the selective scan share.
//
// Constants: T (float, bf16, fp16), STATES, CHANNELS, BC_ROW, Z_ROW, DY_ROW (numbers from a row to the next: constants,
// since an address is then part of an instruction), REVERSE and REVERSE2 (of the first and the
// second direction), SKIP, SOFTPLUS, GATE, SCALE; BLOCK (threads, a channel each), CHUNK (states in registers at once),
// ROOM (STATES, made a multiple of CHUNK), FORWARD_TILE, BACKWARD_TILE (steps), FORWARD_THREADS (of a multiprocessor).
#pragma once
#include "device.cuh"

// A block takes BLOCK channels of an image in one direction, and threads walk over the length. (k, b, l, d) and so on:
// k directions, batch b, length l, channels d, states n.
struct Scan {
    const T *u, *delta;       // (k, b, l, d)
    const T *B, *C;           // (k, b, l, n)
    const T *z;               // (b, l, d)
    const T *dy;              // (b, l, d)
    const float *parameters;  // (k, n + 2, d): A, D, bias of the steps
    T *y, *dz;                // (k, b, l, d)
    float *entering;          // (k, b, tiles, n, d), the states before each tile of the backward
    T *du, *ddelta;           // (k, b, l, d)
    float *dBC;               // (blocks, k, b, l, 2 n), sums over the channels of a block
    float *partials;          // (k, b, n + 2, d), like the parameters
                              // in the forward (2, k, b, l, warps): steps and results, added up over a warp's
                              // channels (no field of its own: of more than 128 bytes more registers are used)
    long batch, length;
};

typedef decltype(fetch((const T *)nullptr)) Waiting;

// Where a block works.
struct Place {
    int block, channel;
    bool held;
    int image, sequence;

    DEVICE Place(const Scan &scan, int x, int y) {
        const int blocks = (CHANNELS + BLOCK - 1) / BLOCK;
        block = x % blocks;
        channel = block * BLOCK + threadIdx.x;
        // A thread without a channel reads those of the last.
        held = CHANNELS % BLOCK == 0 || channel < CHANNELS;
        channel = held ? channel : CHANNELS - 1;
        image = x / blocks;
        sequence = y * (int)scan.batch + image;
    }
    // Of a thread without a channel nothing may come in, nor 0 times infinity.
    DEVICE float mine(float x) const { return held ? x : 0.f; }
};

// log(1 + e^x), exact to float32 where it is small too: log(1 + e) is 2 artanh(s), s = e / (2 + e), a series.
DEVICE float softplus(float x) {
    const float power = -fabsf(x) * LOG2_E;
    // A product is rounded by as much as counts where it is large: what was lost is made up for to first order.
    const float lost = fmaf(-fabsf(x), LOG2_E, -power) - fabsf(x) * LOG2_E_REST;
    float e = exp2_of(power);
    e = power > -120.f ? fmaf(e, lost * LN_2, e) : e;
    const float s = e * inverse_of(2.f + e), q = s * s;
    float series = fmaf(q, 1.f / 15, 1.f / 13);
    series = fmaf(q, series, 1.f / 11);
    series = fmaf(q, series, 1.f / 9);
    series = fmaf(q, series, 1.f / 7);
    series = fmaf(q, series, 1.f / 5);
    series = fmaf(q, series, 1.f / 3);
    return fmaxf(x, 0.f) + 2.f * fmaf(s, q * series, s);
}

// The slope of softplus where its result is `size`, 1 - e^-size, exact to float32 where it is small too.
DEVICE float slope_of_softplus(float size) {
    float series = 1.f - size * (1.f / 6);
    series = 1.f - size * (1.f / 5) * series;
    series = 1.f - size * (1.f / 4) * series;
    series = 1.f - size * (1.f / 3) * series;
    series = 1.f - size * (1.f / 2) * series;
    return size < 0.25f ? size * series : 1.f - exp2_of(-size * LOG2_E);
}

DEVICE float step_size(Waiting raw, float bias) {
    const float shifted = value(raw) + bias;
    return SOFTPLUS ? softplus(shifted) : shifted;
}

// How the threads of a block share TILE rows of at most MOST numbers: each keeps to its columns, so that what it reads
// lies at constant distances.
template <int TILE, int MOST> struct Share {
    static constexpr int MOST_EACH = (MOST + BLOCK - 1) / BLOCK, FEWEST_AT_ONCE = BLOCK < MOST ? 1 : BLOCK / MOST;
    static constexpr int ITEMS = (TILE + FEWEST_AT_ONCE - 1) / FEWEST_AT_ONCE * MOST_EACH;
    int width, row, column;

    DEVICE Share(int thread, int width) : width(width) {
        assume(thread >= 0 && thread < BLOCK);
        row = at_once() == 1 ? 0 : thread / width;
        column = thread - row * width;
    }
    DEVICE int each() const { return (width + BLOCK - 1) / BLOCK; }
    DEVICE int at_once() const { return BLOCK < width ? 1 : BLOCK / width; }

    DEVICE bool has(int i) const { return row < at_once() && column_of(i) < width && row_of(i) < TILE; }
    DEVICE int row_of(int i) const { return row + i / each() * at_once(); }
    DEVICE int column_of(int i) const { return column + i % each() * BLOCK; }
};

// Reads B and C of tiles, rows of 2 STATES numbers, from row `first` on.
template <int AHEAD, int TILE> struct RowReader : Share<TILE, 2 * ROOM> {
    const T *from;
    long gap;  // from where B would go on to where C begins

    DEVICE RowReader(int thread, const T *B, const T *C, long first) : Share<TILE, 2 * ROOM>(thread, 2 * STATES) {
        gap = C - B - STATES;
        from = B + (first + AHEAD * this->row) * BC_ROW + offset(this->column);
    }
    DEVICE long offset(int n) const { return n < STATES ? n : n + gap; }
    DEVICE Waiting operator[](int i) const {
        const long beside = i % this->each() ? offset(this->column_of(i)) - offset(this->column) : 0;
        return fetch(from + AHEAD * (i / this->each() * this->at_once()) * BC_ROW + beside);
    }
    DEVICE void advance() { from += AHEAD * TILE * BC_ROW; }
};

// Where a number of such a row lies in shared memory, where B and C have room for ROOM numbers each.
DEVICE int row_place(int column) { return column < STATES ? column : ROOM + column - STATES; }

DEVICE float part(const float4 &four, int i) { return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w; }
