// The selective scan over the length; and the same again in the backward (REPLAY), which notes the states that enter
// each tile of the backward, the gradient of the gate, and the result where OUTPUT asks for it. MEASURE asks for sums
// over the channels of a warp, of step sizes and of results that are positive before scale and gate.
//
// A thread owns a channel, with its states in registers, and walks over the length in tiles. What a tile reads is asked
// for a tile ahead, but for what its end needs alone. B and C of a tile lie in shared memory, as float32.
#include "scan.cuh"

constexpr int WARP = 32;
DEVICE int warps_of_channels() { return (CHANNELS + WARP - 1) / WARP; }
DEVICE float sum_over_warp(float x) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) x += exchanged(x, mask);
    return x;
}

template <int AHEAD> struct Forward {
    static constexpr int TILE = FORWARD_TILE;
    typedef RowReader<AHEAD, TILE> Reader;
    Reader reader;
    // Where a sequence begins is the same for all threads of a block; places in it have 32 bits, to save registers.
    const T *u, *delta, *z, *dy;
    T *y, *dz;
    float *entering, *sums_of_steps, *sums_of_outputs;
    const float *rates;
    int at, at_sums, at_z, at_dy, at_entering;  // of the tile that is worked on
    float rate[CHUNK], h[CHUNK], skip, bias;
    bool held;
    Waiting next_u[TILE], next_delta[TILE], next_rows[Reader::ITEMS];
    Waiting now_u[TILE], now_delta[TILE], now_z[TILE], now_dy[TILE];

    DEVICE Forward(const Scan &scan, const Place &place)
        : reader(threadIdx.x, scan.B, scan.C, scan.length * place.sequence + (AHEAD < 0 ? scan.length - 1 : 0)) {
        const int first = AHEAD < 0 ? (int)scan.length - 1 : 0;
        const long own = scan.length * place.sequence * CHANNELS;
        u = scan.u + own;
        delta = scan.delta + own;
        y = scan.y + own;
        dz = scan.dz + own;
        z = scan.z + scan.length * place.image * Z_ROW;
        dy = scan.dy + scan.length * place.image * DY_ROW;
        at = first * CHANNELS + place.channel;
        at_z = first * Z_ROW + place.channel;
        at_dy = first * DY_ROW + place.channel;
        const long tiles = (scan.length + BACKWARD_TILE - 1) / BACKWARD_TILE;
        entering = scan.entering + tiles * place.sequence * STATES * CHANNELS;
        at_entering = place.channel;
        sums_of_steps = scan.partials + scan.length * place.sequence * warps_of_channels();
        sums_of_outputs = sums_of_steps + gridDim.y * scan.batch * scan.length * warps_of_channels();
        at_sums = first * warps_of_channels() + place.channel / WARP;
        rates = scan.parameters + (long)blockIdx.y * (STATES + 2) * CHANNELS + place.channel;
        skip = rates[STATES * CHANNELS];
        bias = rates[(STATES + 1) * CHANNELS];
        held = place.held;
        if constexpr (ROOM == CHUNK) read_rates(0);
#pragma unroll
        for (int n = 0; n < CHUNK; n++) h[n] = 0.f;
    }

    DEVICE void read_rates(int first) {
#pragma unroll
        for (int n = 0; n < CHUNK; n++)
            if (first + n < STATES) rate[n] = rates[(first + n) * CHANNELS] * LOG2_E;
    }

    // Asks for the tile `ahead` steps further, of which `left` are there.
    template <bool LAST> DEVICE void ask(int ahead, int left) {
#pragma unroll
        for (int k = 0; k < TILE; k++) {
            const int step = AHEAD * (ahead + (LAST && k >= left ? 0 : k));
            next_u[k] = fetch(u + at + step * CHANNELS);
            next_delta[k] = fetch(delta + at + step * CHANNELS);
        }
#pragma unroll
        for (int i = 0; i < Reader::ITEMS; i++)
            if (reader.has(i) && (!LAST || reader.row_of(i) < left)) next_rows[i] = reader[i];
        reader.advance();
    }

    DEVICE void take(float *rows) {
#pragma unroll
        for (int k = 0; k < TILE; k++) {
            now_u[k] = next_u[k];
            now_delta[k] = next_delta[k];
        }
#pragma unroll
        for (int i = 0; i < Reader::ITEMS; i++)
            if (reader.has(i)) rows[reader.row_of(i) * 2 * ROOM + row_place(reader.column_of(i))] = value(next_rows[i]);
    }

    // Takes the states from `first` on a step further; adds up what they give in four sums.
    DEVICE void walk(int first, const float *rows, float size, float taken, float *sums) {
        const float4 *B4 = (const float4 *)(rows + first), *C4 = (const float4 *)(rows + ROOM + first);
#pragma unroll
        for (int n = 0; n < CHUNK; n++)
            if (first + n < STATES) {
                h[n] = fmaf(exp2_of(size * rate[n]), h[n], taken * part(B4[n / 4], n % 4));
                sums[n % 4] = fmaf(part(C4[n / 4], n % 4), h[n], sums[n % 4]);
            }
    }

    DEVICE void write(int k, float size, const float *sums) {
        const float now = value(now_u[k]);
        float out = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        if (SKIP) out = fmaf(skip, now, out);
        if (MEASURE) {
            // NaN stays NaN.
            const float steps = sum_over_warp(held ? size : 0.f), outputs = sum_over_warp(held && !(out < 0.f) ? out : 0.f);
            if (held && threadIdx.x % WARP == 0) {
                sums_of_steps[at_sums + AHEAD * k * warps_of_channels()] = steps;
                sums_of_outputs[at_sums + AHEAD * k * warps_of_channels()] = outputs;
            }
        }
        out *= SCALE;
        const float gate = GATE ? value(now_z[k]) : 0.f, open = GATE ? sigmoid(gate) : 0.f;
        if (!held) return;
        const float dopen = out * open * (1.f + gate * (1.f - open));
        if (REPLAY && GATE) store(dz + at + AHEAD * k * CHANNELS, value(now_dy[k]) * dopen);
        if (GATE) out *= gate * open;
        if (OUTPUT) store(y + at + AHEAD * k * CHANNELS, out);
    }

    template <bool LAST> DEVICE void tile(const float *rows, float *kept, int left) {
#pragma unroll
        for (int k = 0; k < TILE; k++) {
            const int ahead = LAST && k >= left ? 0 : AHEAD * k;
            if (GATE) now_z[k] = fetch(z + at_z + ahead * Z_ROW);
            if (REPLAY && GATE) now_dy[k] = fetch(dy + at_dy + ahead * DY_ROW);
        }
        if constexpr (ROOM == CHUNK) {
#pragma unroll
            for (int k = 0; k < TILE; k++)
                if (!LAST || k < left) {
                    float sums[4] = {0.f, 0.f, 0.f, 0.f};
                    const float size = step_size(now_delta[k], bias);
                    walk(0, rows + k * 2 * ROOM, size, size * value(now_u[k]), sums);
                    write(k, size, sums);
                }
        } else {
            // As many states as registers have room for, one lot after the other; the rest of them in memory meanwhile.
            float sums[TILE][4] = {}, size[TILE];
#pragma unroll
            for (int k = 0; k < TILE; k++) size[k] = step_size(now_delta[k], bias);
#pragma unroll 1
            for (int first = 0; first < STATES; first += CHUNK) {
                read_rates(first);
#pragma unroll
                for (int n = 0; n < CHUNK; n++) h[n] = kept[first + n];
#pragma unroll
                for (int k = 0; k < TILE; k++)
                    if (!LAST || k < left)
                        walk(first, rows + k * 2 * ROOM, size[k], size[k] * value(now_u[k]), sums[k]);
#pragma unroll
                for (int n = 0; n < CHUNK; n++) kept[first + n] = h[n];
            }
#pragma unroll
            for (int k = 0; k < TILE; k++)
                if (!LAST || k < left) write(k, size[k], sums[k]);
        }
        at += AHEAD * TILE * CHANNELS;
        at_sums += AHEAD * TILE * warps_of_channels();
        at_z += AHEAD * TILE * Z_ROW;
        at_dy += AHEAD * TILE * DY_ROW;
    }

    DEVICE void note_states(const float *kept) {
#pragma unroll
        for (int n = 0; n < ROOM; n++)
            if (held && n < STATES) entering[at_entering + n * CHANNELS] = ROOM == CHUNK ? h[n % CHUNK] : kept[n];
        at_entering += STATES * CHANNELS;
    }

    // `rows` are two tiles, so that one can be written while the other is still read.
    DEVICE void run(int length, float (*rows)[TILE * 2 * ROOM]) {
        // The states where registers have no room for all. Not with the rest, all of which would then lie in memory.
        float kept[ROOM > CHUNK ? ROOM : 1] = {};
        if (length >= TILE) ask<false>(0, length);
        else ask<true>(0, length);
        int left = length;
        for (int i = 0; left > 0; i++, left -= TILE) {
            float *now = rows[i & 1];
            take(now);
            __syncthreads();
            if (left >= 2 * TILE) ask<false>(TILE, left);
            else if (left > TILE) ask<true>(TILE, left - TILE);
            if (REPLAY && i % (BACKWARD_TILE / TILE) == 0) note_states(kept);
            if (left >= TILE) tile<false>(now, kept, left);
            else tile<true>(now, kept, left);
        }
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK, FORWARD_THREADS / BLOCK) scan_forward(const Scan scan) {
    __shared__ __align__(16) float rows[2][FORWARD_TILE * 2 * ROOM];
    const Place place(scan, blockIdx.x, blockIdx.y);
    if (blockIdx.y == 0 ? REVERSE : REVERSE2) Forward<-1>(scan, place).run(scan.length, rows);
    else Forward<1>(scan, place).run(scan.length, rows);
}
