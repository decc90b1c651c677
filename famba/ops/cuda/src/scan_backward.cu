// The gradients of the selective scan, from the states that enter each tile, which the forward has noted.
//
// Tiles are taken from the last to the first. In a tile a thread takes one state after the other, with its values at
// all steps in registers. The gradients of B and C are sums over channels: each lane of a warp holds a value for 2 TILE
// sums, and by halving exchanges each is left with one finished sum. Nothing is added by atomics.
#include "scan.cuh"

static_assert(BACKWARD_TILE == 16, "the 32 lanes of a warp are to be left with two sums for each step");

// Adds up v over the lanes of a warp: lane i is left with the sum of their v[i] in v[0].
template <int COUNT> DEVICE void add_lanes(float *v, int lane) {
    const bool upper = lane & COUNT;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float give = upper ? v[i] : v[i + COUNT], keep = upper ? v[i + COUNT] : v[i];
        v[i] = keep + exchanged(give, COUNT);
    }
    if constexpr (COUNT > 1) add_lanes<COUNT / 2>(v, lane);
}

// What a block shares.
struct Memory {
    float rows[2 * ROOM][BACKWARD_TILE + 4];  // B and C of a tile, a row for each state
    float warp_sums[CHUNK][BLOCK + 1];        // of each thread, one of its warp's; odd rows spread them over banks
};

// A number for each state that a thread keeps from tile to tile: in shared memory where there is room for two of these
// for all threads, else in memory of its own.
constexpr int KEPT = ROOM + 2;
constexpr bool IS_ROOM = sizeof(Memory) + 2 * sizeof(float) * KEPT * BLOCK <= 48 * 1024;
template <bool SHARED> struct PerState {
    float (*all)[BLOCK];
    DEVICE PerState(float (*all)[BLOCK]) : all(all) {}
    DEVICE float &operator[](int n) { return all[n][threadIdx.x]; }
};
template <> struct PerState<false> {
    float own[KEPT];
    DEVICE PerState(float (*)[BLOCK]) {}
    DEVICE float &operator[](int n) { return own[n]; }
};

template <int AHEAD> struct Backward {
    static constexpr int TILE = BACKWARD_TILE;
    const Scan &scan;
    Memory &memory;
    PerState<IS_ROOM> &carried, &sums_over_steps;  // the second: the gradients of A, then of D and of the bias
    int length;

    // Worked out again for each tile: registers are few.
    DEVICE Place find_place() const { return Place(scan, hidden(blockIdx.x), blockIdx.y); }

    // Reads B and C from step `first` of the sequence on.
    template <bool LAST> DEVICE void read_rows(const Place &place, int first, int left) {
        typedef RowReader<AHEAD, TILE> Reader;
        const Reader reader(hidden(threadIdx.x), scan.B, scan.C, (long)place.sequence * length + first);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Reader::ITEMS; i++)
            if (reader.has(i) && (!LAST || reader.row_of(i) < left))
                memory.rows[row_place(reader.column_of(i))][reader.row_of(i)] = value(reader[i]);
        __syncthreads();
    }

    // Adds up over warps what they have summed up for `count` states from `from` on.
    DEVICE void add_warps(int from, int count, int first, int left) {
        const Place place = find_place();
        __syncthreads();
        const long sequences = gridDim.y * scan.batch;
        float *out = scan.dBC + ((place.block * sequences + place.sequence) * length + first) * 2 * STATES;
        const Share<TILE, 2 * CHUNK> share(hidden(threadIdx.x), 2 * count);
#pragma unroll
        for (int i = 0; i < share.ITEMS; i++) {
            const int k = share.row_of(i), column = share.column_of(i), of_C = column >= count;
            const int n = column - of_C * count;
            if (!share.has(i) || k >= left) continue;
            float sum = 0.f;
#pragma unroll
            for (int warp = 0; warp < BLOCK / 32; warp++) sum += memory.warp_sums[n][warp * 32 + of_C * TILE + k];
            out[AHEAD * k * 2 * STATES + of_C * STATES + from + n] = sum;
        }
    }

    // Where the parameters of a direction begin.
    DEVICE const float *parameters() const { return scan.parameters + (int)blockIdx.y * (STATES + 2) * CHANNELS; }

    // Where tile `index` begins.
    DEVICE int first_of(int index) const { return hidden(AHEAD < 0 ? length - 1 - index * TILE : index * TILE); }

    // Reads tile `index`, of which `left` steps are there.
    template <bool LAST>
    DEVICE void begin(const Place &place, int index, int left, float *size, float *taken, float *grad) {
        // As in the forward: where a sequence begins is the same for all threads, and places in it are 32 bits.
        const int first = first_of(index);
        const long own = (long)place.sequence * length * CHANNELS, beside = (long)place.image * length;
        const T *u = scan.u + own, *delta = scan.delta + own;
        const T *z = scan.z + beside * Z_ROW, *dy = scan.dy + beside * DY_ROW;
        const int at = first * CHANNELS + place.channel, at_z = first * Z_ROW + place.channel;
        const int at_dy = first * DY_ROW + place.channel;
        const float bias = parameters()[(STATES + 1) * CHANNELS + place.channel];
        float dskip = 0.f;
        read_rows<LAST>(place, first, left);
#pragma unroll
        for (int k = 0; k < TILE; k++) {
            size[k] = taken[k] = grad[k] = 0.f;
            if (LAST && k >= left) continue;
            const float now = place.mine(value(fetch(u + at + AHEAD * k * CHANNELS)));
            size[k] = place.mine(step_size(fetch(delta + at + AHEAD * k * CHANNELS), bias));
            grad[k] = place.mine(value(fetch(dy + at_dy + AHEAD * k * DY_ROW))) * SCALE;
            if (GATE) {
                const float gate = value(fetch(z + at_z + AHEAD * k * Z_ROW));
                grad[k] *= place.mine(gate * sigmoid(gate));
            }
            taken[k] = size[k] * now;
            dskip = fmaf(grad[k], now, dskip);
        }
        sums_over_steps[STATES] += dskip;
    }

    // Writes the gradients of u and delta.
    template <bool LAST>
    DEVICE void end(const Place &place, int index, int left, const float *size, const float *grad, const float *dtaken,
                    const float *dpower) {
        const long own = (long)place.sequence * length * CHANNELS;
        const int at = first_of(index) * CHANNELS + place.channel;
        const float skip = parameters()[STATES * CHANNELS + place.channel];
        float dbias = 0.f;
#pragma unroll
        for (int k = 0; k < TILE; k++) {
            if (LAST && k >= left) continue;
            const float now = value(fetch(scan.u + own + at + AHEAD * k * CHANNELS));
            float out = dtaken[k] * size[k];
            if (SKIP) out = fmaf(grad[k], skip, out);
            float dsize = fmaf(dtaken[k], now, dpower[k]);
            if (SOFTPLUS) dsize *= slope_of_softplus(size[k]);
            dbias += dsize;
            if (!place.held) continue;
            store(scan.du + own + at + AHEAD * k * CHANNELS, out);
            store(scan.ddelta + own + at + AHEAD * k * CHANNELS, dsize);
        }
        sums_over_steps[STATES + 1] += dbias;
    }

    template <bool LAST> DEVICE void tile(int index, int left) {
        float size[TILE], taken[TILE], grad[TILE], dtaken[TILE], dpower[TILE];
        begin<LAST>(find_place(), index, left, size, taken, grad);
#pragma unroll
        for (int k = 0; k < TILE; k++) dtaken[k] = dpower[k] = 0.f;
        if constexpr (ROOM == CHUNK) {
            states<LAST>(find_place(), 0, STATES, index, left, size, taken, grad, dtaken, dpower);
        } else {
#pragma unroll 1
            for (int from = 0; from < STATES; from += CHUNK) {
                const int count = STATES - from < CHUNK ? STATES - from : CHUNK;
                if (from > 0) __syncthreads();
                states<LAST>(find_place(), from, count, index, left, size, taken, grad, dtaken, dpower);
            }
        }
        end<LAST>(find_place(), index, left, size, grad, dtaken, dpower);
    }

    // Takes `count` states from `from` on through a tile.
    template <bool LAST>
    DEVICE void states(const Place &place, int from, int count, int index, int left, const float *size,
                       const float *taken, const float *grad, float *dtaken, float *dpower) {
        const int lane = threadIdx.x % 32, tiles = (length + TILE - 1) / TILE;
        const float *rates = parameters() + place.channel;
        const long tile = (long)place.sequence * tiles + index;
        const float *entering = scan.entering + tile * STATES * CHANNELS + place.channel;
        float next_rate = read(rates + from * CHANNELS), next_entering = read(entering + from * CHANNELS);
#pragma unroll 1
        for (int n = from; n < from + count; n++) {
            // What the next state needs is asked for here.
            const float A = place.mine(next_rate), before = place.mine(next_entering), rate = A * LOG2_E;
            if (n + 1 < from + count) {
                next_rate = read(rates + (n + 1) * CHANNELS);
                next_entering = read(entering + (n + 1) * CHANNELS);
            }
            const float4 *B4 = (const float4 *)memory.rows[n], *C4 = (const float4 *)memory.rows[ROOM + n];
            float h[TILE], decay[TILE], sums[2 * TILE];
#pragma unroll
            for (int k = 0; k < TILE; k++) {
                decay[k] = exp2_of(size[k] * rate);
                const float stays = decay[k] * (k ? h[k - 1] : before);
                h[k] = fmaf(taken[k], part(B4[k / 4], k % 4), stays);
                if (LAST && k >= left) h[k] = decay[k] = 0.f;
            }
            float dh = carried[n], total = sums_over_steps[n];
#pragma unroll
            for (int k = TILE - 1; k >= 0; k--) {
                sums[k] = sums[TILE + k] = 0.f;
                if (LAST && k >= left) continue;
                dh = fmaf(grad[k], part(C4[k / 4], k % 4), dh);
                sums[TILE + k] = h[k] * grad[k];
                sums[k] = dh * taken[k];
                dtaken[k] = fmaf(dh, part(B4[k / 4], k % 4), dtaken[k]);
                dh *= decay[k];
                const float ddecay = dh * (k ? h[k - 1] : before);
                total = fmaf(ddecay, size[k], total);
                dpower[k] = fmaf(ddecay, A, dpower[k]);
            }
            carried[n] = dh;
            sums_over_steps[n] = total;
            add_lanes<TILE>(sums, lane);
            memory.warp_sums[n - from][threadIdx.x] = sums[0];
        }
        add_warps(from, count, first_of(index), left);
    }

    DEVICE void run() {
        for (int n = 0; n < STATES + 2; n++) sums_over_steps[n] = 0.f;
        for (int n = 0; n < STATES; n++) carried[n] = 0.f;
        for (int index = (length - 1) / TILE; index >= 0; index--) {
            const int left = length - index * TILE;
            if (left < TILE) tile<true>(index, left);
            else tile<false>(index, TILE);
        }
        const Place place = find_place();
        if (!place.held) return;
        float *partials = scan.partials + (long)place.sequence * (STATES + 2) * CHANNELS + place.channel;
        for (int n = 0; n < STATES + 2; n++) partials[n * CHANNELS] = sums_over_steps[n];
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK, 384 / BLOCK) scan_backward(const Scan scan) {
    __shared__ __align__(16) Memory memory;
    __shared__ float all[2][IS_ROOM ? KEPT : 1][BLOCK];
    PerState<IS_ROOM> carried(all[0]), sums_over_steps(all[1]);
    const int length = scan.length;
    if (blockIdx.y == 0 ? REVERSE : REVERSE2) Backward<-1>{scan, memory, carried, sums_over_steps, length}.run();
    else Backward<1>{scan, memory, carried, sums_over_steps, length}.run();
}
