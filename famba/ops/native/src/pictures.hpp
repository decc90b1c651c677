// Pictures of three colours, whole numbers in 0..255, scaled and moved as Pillow does it.
#pragma once

#include <algorithm>
#include <cmath>

#include "parallel.hpp"

namespace famba {
namespace FAMBA_ISA {

// Sums of whole numbers, so every order of adding gives the same picture. T is not used.
template <class T>
void resample(const famba_scaling &p) {
    for_each(p.threads, p.batch, [&](int64_t image) {
        const int64_t lines = 3 * p.height;
        int32_t *across = reinterpret_cast<int32_t *>(task_scratch().take(lines * p.size));
        const uint8_t *pixels = p.images + image * lines * p.width;
        const int32_t *first = p.first_columns + image * p.size;
        const int32_t *weights = p.columns + image * p.size * p.taps_across;
        for (int64_t line = 0; line < lines; ++line)
            for (int64_t x = 0; x < p.size; ++x) {
                const uint8_t *near = pixels + line * p.width + first[x];
                int32_t total = 1 << 21;
                for (int64_t k = 0; k < p.taps_across; ++k) total += near[k] * weights[x * p.taps_across + k];
                across[line * p.size + x] = std::clamp(total >> 22, 0, 255);
            }
        for (int64_t channel = 0; channel < 3; ++channel)
            for (int64_t y = 0; y < p.size; ++y) {
                const int32_t *above = across + (channel * p.height + p.first_rows[image * p.size + y]) * p.size;
                const int32_t *weight = p.rows + (image * p.size + y) * p.taps_down;
                uint8_t *out = p.out + ((image * 3 + channel) * p.size + y) * p.size;
                for (int64_t start = 0; start < p.size; start += 64) {
                    const int64_t count = std::min<int64_t>(64, p.size - start);
                    int32_t totals[64];
                    std::fill_n(totals, 64, 1 << 14);
                    for (int64_t k = 0; k < p.taps_down; ++k)
                        for (int64_t x = 0; x < count; ++x) totals[x] += weight[k] * above[k * p.size + start + x];
                    for (int64_t x = 0; x < count; ++x)
                        out[start + x] = static_cast<uint8_t>(std::clamp(totals[x] >> 15, 0, 255));
                }
            }
    });
}

// Four colours, the last of which is empty.
typedef float Colours __attribute__((vector_size(16)));

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
        carve(task_scratch(), {4 * (p.height + 4) * stride, 4 * p.width, 4 * p.height}, {&memory, &part_x, &part_y});
        uint8_t *out = p.images + p.rows[image] * 3 * area;
        for (int64_t y = 0; y < p.height + 4; ++y) {
            const uint8_t *row = out + std::clamp<int64_t>(y - 2, 0, p.height - 1) * p.width;
            for (int64_t x = 0; x < stride; ++x) {
                const uint8_t *pixel = row + std::clamp<int64_t>(x - 2, 0, p.width - 1);
                for (int channel = 0; channel < 4; ++channel)
                    memory[4 * (y * stride + x) + channel] = channel < 3 ? pixel[channel * area] : 0;
            }
        }
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
                float to_right[4], to_below[4];
                taps(static_cast<float>(across - 0.5 - column), p.bicubic, to_right);
                taps(static_cast<float>(down - 0.5 - row), p.bicubic, to_below);
                const Colours *corner = reinterpret_cast<const Colours *>(memory) +
                                        (static_cast<int64_t>(row) + 1) * stride + static_cast<int64_t>(column) + 1;
                Colours total = {};
                for (int below = 0; below < 4; ++below) {
                    if (to_below[below] == 0) continue;  // a row that moves along itself
                    const Colours *near = corner + below * stride;
                    total += (near[0] * to_right[0] + near[1] * to_right[1] + near[2] * to_right[2] +
                              near[3] * to_right[3]) * to_below[below];
                }
                // Cut off as in Pillow, but a sum that rounding left just below a whole number is that number.
                for (int channel = 0; channel < 3; ++channel)
                    out[channel * area] =
                        static_cast<uint8_t>(std::clamp(total[channel] + 0x1p-10F, 0.0F, 255.0F));
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
