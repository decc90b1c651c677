// What Python and the kernels agree on: plain C, no torch, so that one build serves every release of torch and Python.
// `famba/ops/native/library.py` mirrors the structs field by field.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Element type of activations; parameters and states are always float32.
enum famba_dtype { FAMBA_FLOAT32 = 0, FAMBA_BFLOAT16 = 1 };

// A (batch, length, channels) array: channels adjacent, strides in elements. data is NULL for what is absent.
typedef struct {
    void *data;
    int64_t batch_stride, row_stride;
} famba_array;

typedef struct {
    int64_t batch, length, channels, states;
    int64_t chunk;       // steps between two kept states; the length or more where none is kept
    int32_t dtype;       // of u, delta, B, C, z, y, dy and their gradients
    int32_t threads;
    int32_t softplus, reverse;
    int32_t accumulate;  // add to y and dz instead of writing them
    float scale;         // of y
    famba_array u, delta, B, C, z, y;
    const float *A, *D, *delta_bias;  // (channels, states), (channels), (channels)
    float *state;                     // (batch, chunks - 1, channels, states), states that enter chunks 1, 2, ...
    // Forward only, both or none: (batch, length), the mean step size, and the sum of the positive results before scale
    // and gate.
    float *step_means, *output_sums;
    // Backward only. y may be asked for there too.
    famba_array dy, du, ddelta, dB, dC, dz;
    float *dA, *dD, *ddelta_bias;
} famba_scan;

typedef struct {
    int64_t batch, length, channels, width;
    int32_t dtype;  // of x, y, dy and dx
    int32_t threads;
    int32_t silu, reverse;
    int32_t accumulate;  // add to dx instead of writing it
    famba_array x, y;
    const float *weight, *bias;  // (channels, width), (channels)
    famba_array dy, dx;
    float *dweight, *dbias;
} famba_conv;

typedef struct {
    int64_t rows, channels;
    int32_t dtype;  // of x, normed and dnormed
    int32_t threads;
    float eps;
    const void *x, *dnormed;  // (rows, channels), adjacent
    void *normed;
    const float *residual, *weight, *dtotal;
    float *total, *grad, *dweight;
} famba_norm;

typedef struct {
    int64_t batch, length, fused, channels;
    int32_t dtype;  // of x and y, or of dy and dx
    int32_t threads;
    famba_array x, y;       // (batch, length, channels), (batch, fused, channels)
    const int64_t *places;  // (batch, length), each in [0, fused)
    const float *weights;   // (batch, length)
} famba_fuse;

// Pictures (batch, 3, height, width) scaled to (batch, 3, size, size), first across, then down.
typedef struct {
    int64_t batch, height, width, size;
    int32_t dtype;  // FAMBA_FLOAT32
    int32_t threads;
    int32_t bicubic;  // or else bilinear
    const uint8_t *images;
    // (batch, 4): start and extent of what is scaled, in pixels; its sides when it is scaled; the first result's centre
    // there and the way to the next. down, across: the same for all images.
    const double *rows, *columns;
    double down, across;
    uint8_t *out;
} famba_scaling;

// Those at `rows` of pictures (any, 3, height, width), changed in place: the pixel at (x, y) comes from
// (a x + b y + c, d x + e y + f), or is the fill.
typedef struct {
    int64_t count, height, width;
    int32_t dtype;  // FAMBA_FLOAT32
    int32_t threads;
    int32_t bicubic;  // or else bilinear
    uint8_t *images;
    const int64_t *rows;     // (count), each once
    const double *matrices;  // (count, 6), a to f
    const uint8_t *fill;     // (3)
} famba_motion;

// Those at `rows` of pictures (any, 3, area), changed in place: each value becomes its entry in a table.
typedef struct {
    int64_t count, area;
    int32_t dtype;  // FAMBA_FLOAT32
    int32_t threads;
    uint8_t *images;
    const int64_t *rows;    // (count), each once
    const uint8_t *tables;  // (count, 3, 256)
} famba_lookup;

#pragma GCC visibility push(default)

// Instruction sets in rising order. `famba_isa_best` is the last that this processor has of what was built.
enum famba_isa { FAMBA_PORTABLE = 0, FAMBA_AVX2 = 1, FAMBA_AVX512 = 2 };
int famba_isa_best(void);

// The kernels and their arguments: famba_scan_forward(isa, &arguments) and so on. Each returns 0, or 1 where memory
// ran out. The caller has checked shapes and strides, and the instruction set.
#define FAMBA_KERNELS(DO)                                            \
    DO(scan_forward, famba_scan) DO(scan_backward, famba_scan)       \
    DO(conv_forward, famba_conv) DO(conv_backward, famba_conv)       \
    DO(norm_forward, famba_norm) DO(norm_backward, famba_norm)       \
    DO(fuse_forward, famba_fuse) DO(fuse_backward, famba_fuse)       \
    DO(resample, famba_scaling) DO(move, famba_motion) DO(look_up, famba_lookup)
#define FAMBA_DECLARE(name, arguments) int famba_##name(int isa, const arguments *);
FAMBA_KERNELS(FAMBA_DECLARE)

// Sizes of the structs above, in their order, for the loader to compare.
void famba_struct_sizes(int64_t sizes[7]);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
