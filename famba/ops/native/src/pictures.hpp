// Pictures of three colours, whole numbers in 0..255, scaled and moved as Pillow does it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.hpp"

namespace famba {
namespace FAMBA_ISA {

// No fused multiply-adds here: weights that are rounded otherwise than on other devices would make other pictures.
#if !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

// The pixels that each result along an axis sums up: `taps` from the first on, by weights of 2**bits in all.
struct Sums {
    int64_t taps;
    std::vector<int64_t> first;
    std::vector<int32_t> weights;

    Sums(const double *span, double scaled, int64_t source, int64_t size, bool bicubic, int bits) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
        const double start = span[0], end = start + span[1], scale = span[1] / scaled, widened = std::max(scale, 1.0);
        const double reach = (bicubic ? 2 : 1) * widened;
        taps = std::min(source, 2 * static_cast<int64_t>(std::ceil(reach)) + 1);
        std::vector<double> exact(static_cast<size_t>(taps));
        for (int64_t i = 0; i < size; ++i) {
            const double centre = start + (span[2] + span[3] * i) * scale;
            first.push_back(std::clamp<int64_t>(static_cast<int64_t>(std::floor(centre - reach)), 0, source - taps));
            double total = 0;
            for (int64_t k = 0; k < taps; ++k) {
                const double pixel = first.back() + k, x = std::abs((pixel + 0.5 - centre) / widened);
                exact[k] = pixel >= start && pixel < end ? (bicubic ? cubic(x) : std::max(0.0, 1 - x)) : 0;
                total += exact[k];
            }
            for (const double weight : exact) weights.push_back(std::lrint(std::ldexp(weight / total, bits)));
        }
    }

    // The kernel of Keys (1981) with a = -0.5.
    static double cubic(double x) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
        if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
        return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
    }
};

#if !defined(__clang__)
#pragma GCC pop_options
#endif

// Sums of whole numbers, so every order of adding gives the same picture. T is not used.
template <class T>
void resample(const famba_scaling &p) {
    for_each(p.threads, p.batch, [&](int64_t image) {
        const Sums rows(p.rows + image * 4, p.down, p.height, p.size, p.bicubic, 15);
        const Sums columns(p.columns + image * 4, p.across, p.width, p.size, p.bicubic, 22);
        const auto ends = std::minmax_element(rows.first.begin(), rows.first.end());
        const int64_t top = *ends.first, bottom = *ends.second + rows.taps, size = p.size;
        float *memory[2];
        carve(task_scratch, {16 * p.width, (bottom - top) * size}, {&memory[0], &memory[1]});
        int32_t *tile = reinterpret_cast<int32_t *>(memory[0]), *across = reinterpret_cast<int32_t *>(memory[1]);
        for (int64_t channel = 0; channel < 3; ++channel) {
            const uint8_t *pixels = p.images + (image * 3 + channel) * p.height * p.width;
            for (int64_t line = top; line < bottom; line += 16) {  // lines side by side, for vectors
                const int64_t count = std::min<int64_t>(16, bottom - line);
                for (int64_t j = 0; j < 16; ++j)
                    for (int64_t x = 0; x < p.width; ++x)
                        tile[x * 16 + j] = pixels[(line + std::min(j, count - 1)) * p.width + x];
                for (int64_t x = 0; x < size; ++x) {
                    int32_t totals[16];
                    std::fill_n(totals, 16, 1 << 21);
                    for (int64_t k = 0; k < columns.taps; ++k)
                        for (int64_t j = 0; j < 16; ++j)
                            totals[j] += columns.weights[x * columns.taps + k] * tile[(columns.first[x] + k) * 16 + j];
                    for (int64_t j = 0; j < count; ++j)
                        across[(line - top + j) * size + x] = std::clamp(totals[j] >> 22, 0, 255);
                }
            }
            for (int64_t y = 0; y < size; ++y) {
                const int32_t *above = across + (rows.first[y] - top) * size, *weight = &rows.weights[y * rows.taps];
                uint8_t *out = p.out + ((image * 3 + channel) * size + y) * size;
                for (int64_t start = 0; start < size; start += 64) {
                    const int64_t count = std::min<int64_t>(64, size - start);
                    int32_t totals[64];
                    std::fill_n(totals, 64, 1 << 14);
                    for (int64_t k = 0; k < rows.taps; ++k)
                        for (int64_t x = 0; x < count; ++x) totals[x] += weight[k] * above[k * size + start + x];
                    for (int64_t x = 0; x < count; ++x)
                        out[start + x] = static_cast<uint8_t>(std::clamp(totals[x] >> 15, 0, 255));
                }
            }
        }
    });
}

// Four colours, the last of which is empty.
typedef float Colours __attribute__((vector_size(16)));
typedef int32_t Whole __attribute__((vector_size(16)));

// Weights of the pixels at -1, 0, 1 and 2, for a place `right` of the pixel at 0. Bicubic: the kernel of Keys (1981)
// with a = -1.
inline void taps(float right, bool bicubic, float (&weights)[4]) {
    const float left = 1 - right, both = bicubic ? left * right : 0;
    weights[0] = -both * left;
    weights[1] = bicubic ? 1 - right * right * (1 + left) : left;
    weights[2] = bicubic ? 1 - left * left * (1 + right) : right;
    weights[3] = -both * right;
}

template <class T>
void move(const famba_motion &p) {
    for_each(p.threads, p.count, [&](int64_t image) {
        const int64_t area = p.height * p.width, stride = p.width + 4;
        float *memory, *part_x, *part_y;  // the image with its border twice around it; and a x, d x, b y, e y in float64
        carve(task_scratch, {4 * (p.height + 4) * stride, 4 * p.width, 4 * p.height}, {&memory, &part_x, &part_y});
        uint8_t *out = p.images + p.rows[image] * 3 * area;
        for (int64_t y = 0; y < p.height + 4; ++y) {
            const uint8_t *row = out + std::clamp<int64_t>(y - 2, 0, p.height - 1) * p.width;
            for (int64_t x = 0; x < stride; ++x) {
                const uint8_t *pixel = row + std::clamp<int64_t>(x - 2, 0, p.width - 1);
                for (int channel = 0; channel < 4; ++channel)
                    memory[4 * (y * stride + x) + channel] = channel < 3 ? pixel[channel * area] : 0;
            }
        }
        float to_right[4] = {}, to_below[4] = {};
        double right = -1, below = -1;  // of which these are the weights
        const Colours none = {0, 0, 0, 0}, full = {255, 255, 255, 255};
        // Products apart from the sums: a fused multiply-add would round otherwise than the other devices.
        const double *matrix = p.matrices + image * 6;
        double *by_x = reinterpret_cast<double *>(part_x), *by_y = reinterpret_cast<double *>(part_y);
        for (int64_t x = 0; x < p.width; ++x)
            for (int64_t line = 0; line < 2; ++line) by_x[line * p.width + x] = matrix[3 * line] * (x + 0.5);
        for (int64_t y = 0; y < p.height; ++y)
            for (int64_t line = 0; line < 2; ++line) by_y[line * p.height + y] = matrix[3 * line + 1] * (y + 0.5);
        for (int64_t y = 0; y < p.height; ++y)
            for (int64_t x = 0; x < p.width; ++x, ++out) {
                const double across = by_x[x] + by_y[y] + matrix[2];
                const double down = by_x[p.width + x] + by_y[p.height + y] + matrix[5];
                if (!(across >= 0 && across < p.width && down >= 0 && down < p.height)) {
                    for (int channel = 0; channel < 3; ++channel) out[channel * area] = p.fill[channel];
                    continue;
                }
                const double column = std::floor(across - 0.5), row = std::floor(down - 0.5);
                if (across - column != right) taps(static_cast<float>((right = across - column) - 0.5), p.bicubic, to_right);
                if (down - row != below) taps(static_cast<float>((below = down - row) - 0.5), p.bicubic, to_below);
                const Colours *corner = reinterpret_cast<const Colours *>(memory) +
                                        (static_cast<int64_t>(row) + 1) * stride + static_cast<int64_t>(column) + 1;
                Colours total = {};
                for (int line = 0; line < 4; ++line) {
                    if (to_below[line] == 0) continue;  // a row that moves along itself
                    const Colours *near = corner + line * stride;
                    total += (near[0] * to_right[0] + near[1] * to_right[1] + near[2] * to_right[2] +
                              near[3] * to_right[3]) * to_below[line];
                }
                // Cut off as in Pillow, but a sum that rounding left just below a whole number is that number.
                total += 0x1p-10F;
                total = total < none ? none : total > full ? full : total;
                const auto whole = __builtin_convertvector(total, Whole);
                for (int channel = 0; channel < 3; ++channel) out[channel * area] = static_cast<uint8_t>(whole[channel]);
            }
    });
}

template <class T>
void look_up(const famba_lookup &p) {
    for_each(p.threads, 3 * p.count, [&](int64_t plane) {
        uint8_t *pixels = p.images + (p.rows[plane / 3] * 3 + plane % 3) * p.area;
        const uint8_t *table = p.tables + plane * 256;
        for (int64_t i = 0; i < p.area; ++i) pixels[i] = table[pixels[i]];
    });
}

}  // namespace FAMBA_ISA
}  // namespace famba
