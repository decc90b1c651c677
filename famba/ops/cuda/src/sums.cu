// Sums, in a fixed order, of what the blocks of other kernels have each written down.
//
// Constants: T (float, bf16, fp16), STATES.
#include "device.cuh"

// Sums over the rows of (k, rows, slots, channels), written for direction k to first[k] (channels, taps), second[k] and
// third[k] (channels): the slots are the taps, and one for each of the others that there is.
struct Columns {
    const float *partials;
    float *first[2], *second[2], *third[2];
    long rows, slots, channels, taps;
};

constexpr int GROUPS = 8;

extern "C" __global__ void __launch_bounds__(32 * GROUPS) column_sums(const Columns columns) {
    __shared__ float groups[GROUPS][32];
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32, k = blockIdx.y;
    const long count = columns.slots * columns.channels, column = blockIdx.x * 32L + lane;
    const float *rows = columns.partials + k * columns.rows * count + column;
    float sum = 0.f;
    if (column < count) {
#pragma unroll 4
        for (long row = group; row < columns.rows; row += GROUPS) sum += rows[row * count];
    }
    groups[group][lane] = sum;
    __syncthreads();
    if (group > 0 || column >= count) return;
    for (int other = 1; other < GROUPS; other++) sum += groups[other][lane];
    const long slot = column / columns.channels, channel = column % columns.channels;
    // An index would have the structure copied into memory.
    float *first = k ? columns.first[1] : columns.first[0], *second = k ? columns.second[1] : columns.second[0];
    float *third = k ? columns.third[1] : columns.third[0];
    if (slot < columns.taps) first[channel * columns.taps + slot] = sum;
    else if (slot == columns.taps && second) second[channel] = sum;
    else if (slot > columns.taps && third) third[channel] = sum;
}

// Sums over the blocks of (blocks, rows, 2 STATES), written as rows of dB and dC.
struct Rows {
    const float *partials;
    T *dB, *dC;
    long blocks, rows, B_row, C_row;
};

extern "C" __global__ void __launch_bounds__(256) row_sums(const Rows sums) {
    const long count = sums.rows * 2 * STATES, item = blockIdx.x * 256L + threadIdx.x;
    if (item >= count) return;
    float sum = 0.f;
    for (int block = 0; block < sums.blocks; block++) sum += sums.partials[block * count + item];
    const long row = item / (2 * STATES);
    const int n = item % (2 * STATES);
    if (n < STATES) store(sums.dB + row * sums.B_row + n, sum);
    else store(sums.dC + row * sums.C_row + n - STATES, sum);
}
