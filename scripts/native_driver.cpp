// Call every kernel through the C interface on small odd shapes and compare it with a plain loop in double.
// check_memory.sh and check_arm.sh run it where Python is too slow or missing.
//
// Each array has exactly its size in memory, at odd strides, so that memory checkers see every access outside it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "interface.h"

namespace {

std::mt19937 generator(0);
int failures = 0;
double worst[2] = {0, 0};  // float32, bfloat16

void fail(const std::string &what, const std::string &why) {
    std::printf("FAILED: %s: %s\n", what.c_str(), why.c_str());
    ++failures;
}

// An array as a kernel takes it; the `gap` elements behind each row are unused.
class Array {
  public:
    Array(int64_t batch, int64_t length, int64_t channels, int dtype, double first, double last, int64_t gap = 1)
        : length_(length), channels_(channels), stride_(channels + gap), dtype_(dtype) {
        const int64_t rows = batch * length, count = rows ? rows * stride_ - gap : 0;
        bytes_.reset(new char[static_cast<size_t>(count * size())]);
        std::uniform_real_distribution<float> numbers(static_cast<float>(first), static_cast<float>(last));
        for (int64_t i = 0; i < count; ++i) {
            const float x = numbers(generator);
            uint32_t u;
            std::memcpy(&u, &x, 4);
            const uint16_t upper = static_cast<uint16_t>(u >> 16);
            if (size() == 2) std::memcpy(bytes_.get() + 2 * i, &upper, 2);
            else std::memcpy(bytes_.get() + 4 * i, &x, 4);
            before_.push_back(get(i));
        }
    }
    famba_array view() { return {bytes_.get(), length_ * stride_, stride_}; }
    float *floats() { return reinterpret_cast<float *>(bytes_.get()); }
    double operator()(int64_t b, int64_t l, int64_t c) const { return get((b * length_ + l) * stride_ + c); }
    double before(int64_t b, int64_t l, int64_t c) const { return before_[(b * length_ + l) * stride_ + c]; }
    // Return whether nothing was written between the rows or, with `all_of_it`, anywhere.
    bool kept(bool all_of_it) const {
        for (int64_t i = 0; i < static_cast<int64_t>(before_.size()); ++i)
            if ((all_of_it || i % stride_ >= channels_) && get(i) != before_[i]) return false;
        return true;
    }
    int64_t length() const { return length_; }
    int64_t channels() const { return channels_; }
    int dtype() const { return dtype_; }

  private:
    int64_t size() const { return dtype_ == FAMBA_BFLOAT16 ? 2 : 4; }
    double get(int64_t i) const {
        uint32_t u = 0;
        uint16_t upper;
        if (size() == 2) {
            std::memcpy(&upper, bytes_.get() + 2 * i, 2);
            u = static_cast<uint32_t>(upper) << 16;
        } else {
            std::memcpy(&u, bytes_.get() + 4 * i, 4);
        }
        float x;
        std::memcpy(&x, &u, 4);
        return x;
    }

    int64_t length_, channels_, stride_;
    int dtype_;
    std::unique_ptr<char[]> bytes_;
    std::vector<double> before_;
};

using Exact = std::vector<double>;

void check(const std::string &what, const Array &found, const Exact &wanted) {
    double scale = 0.1, error = 0;  // sums whose terms cancel are as exact as their terms
    bool finite = true;
    for (int64_t i = 0; i < static_cast<int64_t>(wanted.size()); ++i) {
        const int64_t row = i / found.channels();
        const double x = found(row / found.length(), row % found.length(), i % found.channels());
        scale = std::max(scale, std::abs(wanted[i]));
        error = std::max(error, std::abs(x - wanted[i]));
        finite = finite && std::isfinite(x);
    }
    worst[found.dtype()] = std::max(worst[found.dtype()], error / scale);
    const bool close = error <= scale * (found.dtype() == FAMBA_BFLOAT16 ? 1e-2 : 2e-5);
    if (!close) fail(what, "error " + std::to_string(error) + " where the largest value is " + std::to_string(scale));
    if (!finite) fail(what, "not finite");
    if (!found.kept(false)) fail(what, "written beside the array");
}

void check_inputs(const std::string &what, std::initializer_list<const Array *> inputs) {
    for (const Array *input : inputs)
        if (!input->kept(true)) fail(what, "an input was written to");
}

void check_status(const std::string &what, int status) {
    if (status) fail(what, "status " + std::to_string(status));
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }
double silu_slope(double x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }

struct Case {
    int isa, dtype, threads;
    int64_t batch, length, channels;
    bool options, reverse, accumulate;
    std::string name(const char *kernel) const {
        char text[160];
        std::snprintf(text, sizeof text, "%s, instruction set %d, dtype %d, %d threads, (%d, %d, %d)%s%s%s", kernel, isa,
                      dtype, threads, static_cast<int>(batch), static_cast<int>(length), static_cast<int>(channels),
                      options ? ", options" : "", reverse ? ", reverse" : "", accumulate ? ", accumulate" : "");
        return text;
    }
    Array activation(int64_t width, double first = -1, double last = 1) const {
        return Array(batch, length, width, dtype, first, last);
    }
    Array parameter(int64_t width, double first = -1, double last = 1) const {
        return Array(1, channels, width, FAMBA_FLOAT32, first, last, 0);
    }
};

void scan(const Case &c, int64_t n, int64_t chunk) {
    const int64_t chunks = std::max<int64_t>(1, (c.length + chunk - 1) / chunk);
    Array u = c.activation(c.channels), delta = c.activation(c.channels, 0.01, 1), z = c.activation(c.channels, -3, 3);
    Array B = c.activation(n), C = c.activation(n), dy = c.activation(c.channels), y = c.activation(c.channels);
    Array du = c.activation(c.channels), ddelta = c.activation(c.channels), dB = c.activation(n), dC = c.activation(n);
    Array dz = c.activation(c.channels), again = c.activation(c.channels);
    Array A = c.parameter(n, -2, -0.01), D = c.parameter(1), bias = c.parameter(1, 0, 0.5);
    Array dA = c.parameter(n), dD = c.parameter(1), dbias = c.parameter(1);
    Array state(c.batch, (chunks - 1) * c.channels, n, FAMBA_FLOAT32, 0, 1, 0);

    famba_scan p{};
    p.batch = c.batch, p.length = c.length, p.channels = c.channels, p.states = n, p.chunk = chunk;
    p.dtype = c.dtype, p.threads = c.threads, p.reverse = c.reverse, p.softplus = c.options;
    p.accumulate = c.accumulate, p.scale = c.accumulate ? 0.5f : 1.f;
    p.u = u.view(), p.delta = delta.view(), p.B = B.view(), p.C = C.view(), p.y = y.view(), p.A = A.floats();
    if (c.options) p.z = z.view(), p.D = D.floats(), p.delta_bias = bias.floats();
    p.state = state.floats();
    check_status(c.name("scan forward"), famba_scan_forward(c.isa, &p));
    p.dy = dy.view(), p.du = du.view(), p.ddelta = ddelta.view(), p.dB = dB.view(), p.dC = dC.view();
    if (c.options) p.dz = dz.view();
    p.y = again.view();
    p.dA = dA.floats(), p.dD = dD.floats(), p.ddelta_bias = dbias.floats();
    check_status(c.name("scan backward"), famba_scan_backward(c.isa, &p));

    const int64_t size = c.batch * c.length;
    Exact wanted_y(size * c.channels), wanted_again(wanted_y), wanted_dz(wanted_y), wanted_du(wanted_y);
    Exact wanted_ddelta(wanted_y), wanted_dB(size * n), wanted_dC(wanted_dB), wanted_dA(c.channels * n);
    Exact wanted_dD(c.channels), wanted_dbias(c.channels), h((c.length + 1) * n);
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t d = 0; d < c.channels; ++d) {
            const auto at = [&](int64_t s) { return c.reverse ? c.length - 1 - s : s; };
            const auto step = [&](int64_t s) {
                const double x = delta(b, at(s), d) + (c.options ? bias(0, d, 0) : 0);
                return c.options ? std::log1p(std::exp(x)) : x;
            };
            for (int64_t s = 0; s < c.length; ++s) {
                const int64_t t = at(s), place = (b * c.length + t) * c.channels + d;
                double out = c.options ? D(0, d, 0) * u(b, t, d) : 0;
                for (int64_t k = 0; k < n; ++k) {
                    h[(s + 1) * n + k] = std::exp(step(s) * A(0, d, k)) * h[s * n + k] + step(s) * u(b, t, d) * B(b, t, k);
                    out += C(b, t, k) * h[(s + 1) * n + k];
                }
                out *= p.scale;
                const double gated = c.options ? out * silu(z(b, t, d)) : out;
                wanted_y[place] = gated + (c.accumulate ? y.before(b, t, d) : 0);
                wanted_again[place] = gated + (c.accumulate ? again.before(b, t, d) : 0);
                wanted_dz[place] = dy(b, t, d) * out * silu_slope(z(b, t, d)) + (c.accumulate ? dz.before(b, t, d) : 0);
            }
            Exact carry(n);
            for (int64_t s = c.length - 1; s >= 0; --s) {
                const int64_t t = at(s), place = (b * c.length + t) * c.channels + d;
                const double grad = dy(b, t, d) * p.scale * (c.options ? silu(z(b, t, d)) : 1);
                double ddrive = 0, dstep = 0;
                for (int64_t k = 0; k < n; ++k) {
                    const double dh = grad * C(b, t, k) + carry[k];
                    wanted_dC[(b * c.length + t) * n + k] += grad * h[(s + 1) * n + k];
                    wanted_dB[(b * c.length + t) * n + k] += dh * step(s) * u(b, t, d);
                    ddrive += dh * B(b, t, k);
                    carry[k] = dh * std::exp(step(s) * A(0, d, k));
                    dstep += carry[k] * h[s * n + k] * A(0, d, k);
                    wanted_dA[d * n + k] += carry[k] * h[s * n + k] * step(s);
                }
                dstep += ddrive * u(b, t, d);
                if (c.options) dstep *= sigmoid(delta(b, t, d) + bias(0, d, 0));
                wanted_ddelta[place] = dstep;
                wanted_dbias[d] += dstep;
                wanted_du[place] = ddrive * step(s) + (c.options ? grad * D(0, d, 0) : 0);
                wanted_dD[d] += grad * u(b, t, d);
            }
        }
    check(c.name("scan y"), y, wanted_y);
    check(c.name("scan y of the backward"), again, wanted_again);
    check(c.name("scan du"), du, wanted_du);
    check(c.name("scan ddelta"), ddelta, wanted_ddelta);
    check(c.name("scan dA"), dA, wanted_dA);
    check(c.name("scan dB"), dB, wanted_dB);
    check(c.name("scan dC"), dC, wanted_dC);
    check(c.name("scan dD"), dD, wanted_dD);
    check(c.name("scan ddelta_bias"), dbias, wanted_dbias);
    if (c.options) check(c.name("scan dz"), dz, wanted_dz);
    check_inputs(c.name("scan"), {&u, &delta, &z, &B, &C, &dy, &A, &D, &bias});
}

void conv(const Case &c, int64_t width) {
    Array x = c.activation(c.channels), dy = c.activation(c.channels);
    Array y = c.activation(c.channels), dx = c.activation(c.channels);
    Array weight = c.parameter(width), bias = c.parameter(1), dweight = c.parameter(width), dbias = c.parameter(1);
    famba_conv p{};
    p.batch = c.batch, p.length = c.length, p.channels = c.channels, p.width = width;
    p.dtype = c.dtype, p.threads = c.threads, p.silu = c.options, p.reverse = c.reverse, p.accumulate = c.accumulate;
    p.x = x.view(), p.y = y.view(), p.weight = weight.floats(), p.bias = c.options ? bias.floats() : nullptr;
    check_status(c.name("conv forward"), famba_conv_forward(c.isa, &p));
    p.dy = dy.view(), p.dx = dx.view(), p.dweight = dweight.floats(), p.dbias = dbias.floats();
    check_status(c.name("conv backward"), famba_conv_backward(c.isa, &p));

    const int64_t size = c.batch * c.length * c.channels;
    Exact wanted_y(size), wanted_dx(size), wanted_dweight(c.channels * width), wanted_dbias(c.channels);
    for (int64_t i = 0; i < size && c.accumulate; ++i)
        wanted_dx[i] = dx.before(0, i / c.channels, i % c.channels);
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t t = 0; t < c.length; ++t)
            for (int64_t d = 0; d < c.channels; ++d) {
                const auto there = [&](int64_t k) { return c.reverse ? t + (width - 1 - k) : t - (width - 1 - k); };
                const auto inside = [&](int64_t k) { return there(k) >= 0 && there(k) < c.length; };
                double out = c.options ? bias(0, d, 0) : 0;
                for (int64_t k = 0; k < width; ++k)
                    if (inside(k)) out += x(b, there(k), d) * weight(0, d, k);
                wanted_y[(b * c.length + t) * c.channels + d] = c.options ? silu(out) : out;
                const double grad = dy(b, t, d) * (c.options ? silu_slope(out) : 1);
                wanted_dbias[d] += grad;
                for (int64_t k = 0; k < width; ++k)
                    if (inside(k)) {
                        wanted_dx[(b * c.length + there(k)) * c.channels + d] += grad * weight(0, d, k);
                        wanted_dweight[d * width + k] += grad * x(b, there(k), d);
                    }
            }
    check(c.name("conv y"), y, wanted_y);
    check(c.name("conv dx"), dx, wanted_dx);
    check(c.name("conv dweight"), dweight, wanted_dweight);
    check(c.name("conv dbias"), dbias, wanted_dbias);
    check_inputs(c.name("conv"), {&x, &dy, &weight, &bias});
}

void norm(const Case &c) {
    const int64_t rows = c.batch * c.length;
    const auto activation = [&](int dtype) { return Array(1, rows, c.channels, dtype, -1, 1, 0); };
    Array x = activation(c.dtype), residual = activation(FAMBA_FLOAT32), normed = activation(c.dtype);
    Array dnormed = activation(c.dtype), dtotal = activation(FAMBA_FLOAT32), total = activation(FAMBA_FLOAT32);
    Array grad = activation(FAMBA_FLOAT32), weight = c.parameter(1), dweight = c.parameter(1);
    famba_norm p{};
    p.rows = rows, p.channels = c.channels, p.dtype = c.dtype, p.threads = c.threads, p.eps = 1e-5f;
    p.x = x.view().data, p.residual = c.options ? residual.floats() : nullptr, p.weight = weight.floats();
    p.normed = normed.view().data, p.total = total.floats();
    check_status(c.name("norm forward"), famba_norm_forward(c.isa, &p));
    p.dnormed = dnormed.view().data, p.dtotal = dtotal.floats(), p.grad = grad.floats(), p.dweight = dweight.floats();
    check_status(c.name("norm backward"), famba_norm_backward(c.isa, &p));

    Exact wanted_normed(rows * c.channels), wanted_total(wanted_normed), wanted_grad(wanted_normed);
    Exact wanted_dweight(c.channels);
    for (int64_t row = 0; row < rows; ++row) {
        double squares = 0, dots = 0;
        double *sums = wanted_total.data() + row * c.channels;
        for (int64_t d = 0; d < c.channels; ++d) {
            sums[d] = x(0, row, d) + (c.options ? residual(0, row, d) : 0);
            squares += sums[d] * sums[d];
        }
        const double inverse = 1 / std::sqrt(squares / static_cast<double>(c.channels) + 1e-5);
        for (int64_t d = 0; d < c.channels; ++d) {
            wanted_normed[row * c.channels + d] = sums[d] * inverse * weight(0, d, 0);
            wanted_dweight[d] += dnormed(0, row, d) * sums[d] * inverse;
            dots += dnormed(0, row, d) * weight(0, d, 0) * sums[d] * inverse / static_cast<double>(c.channels);
        }
        for (int64_t d = 0; d < c.channels; ++d)
            wanted_grad[row * c.channels + d] =
                inverse * (dnormed(0, row, d) * weight(0, d, 0) - sums[d] * inverse * dots) + dtotal(0, row, d);
    }
    check(c.name("norm normed"), normed, wanted_normed);
    check(c.name("norm total"), total, wanted_total);
    check(c.name("norm grad"), grad, wanted_grad);
    check(c.name("norm dweight"), dweight, wanted_dweight);
    check_inputs(c.name("norm"), {&x, &residual, &dnormed, &dtotal, &weight});
}

void fuse(const Case &c) {
    const int64_t fused = (c.length + 1) / 2;
    Array x = c.activation(c.channels), dx = c.activation(c.channels);
    Array y(c.batch, fused, c.channels, c.dtype, -1, 1), dy(c.batch, fused, c.channels, c.dtype, -1, 1);
    Array weights(c.batch, 1, c.length, FAMBA_FLOAT32, 0, 1, 0);
    std::vector<int64_t> places(static_cast<size_t>(c.batch * c.length));
    for (auto &place : places) place = static_cast<int64_t>(generator() % static_cast<uint64_t>(fused));
    famba_fuse p{};
    p.batch = c.batch, p.length = c.length, p.fused = fused, p.channels = c.channels;
    p.dtype = c.dtype, p.threads = c.threads, p.x = x.view(), p.y = y.view();
    p.places = places.data(), p.weights = weights.floats();
    check_status(c.name("fuse forward"), famba_fuse_forward(c.isa, &p));
    p.x = dx.view(), p.y = dy.view();
    check_status(c.name("fuse backward"), famba_fuse_backward(c.isa, &p));

    Exact wanted_y(c.batch * fused * c.channels), wanted_dx(c.batch * c.length * c.channels);
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t t = 0; t < c.length; ++t)
            for (int64_t d = 0; d < c.channels; ++d) {
                const int64_t place = places[b * c.length + t];
                wanted_y[(b * fused + place) * c.channels + d] += weights(b, 0, t) * x(b, t, d);
                wanted_dx[(b * c.length + t) * c.channels + d] = weights(b, 0, t) * dy(b, place, d);
            }
    check(c.name("fuse y"), y, wanted_y);
    check(c.name("fuse dx"), dx, wanted_dx);
    check_inputs(c.name("fuse"), {&x, &dy, &weights});
}

void run_all(int isa, int threads) {
    int number = 0;
    for (const int dtype : {FAMBA_FLOAT32, FAMBA_BFLOAT16})
        for (const int64_t channels : {0, 1, 3, 4, 7, 8, 9, 17, 33})
            for (const int64_t length : {0, 1, 2, 15, 33}) {
                ++number;  // the rest in turn: all combinations would take minutes under a tool
                const int64_t batch = std::vector<int64_t>{1, 2, 0, 3, 17, 1, 4}[number % 7];
                const Case it{isa, dtype, threads, batch, length, channels, number % 2 == 0, number % 4 < 2, number % 3 == 0};
                const int64_t states = std::vector<int64_t>{1, 3, 4, 5, 16, 0}[number % 6];
                scan(it, states, std::vector<int64_t>{384, 1, 4, 7}[number % 4]);
                conv(it, 1 + number % 5);
                norm(it);
                fuse(it);
            }
    const Case longer{isa, FAMBA_FLOAT32, threads, 2, 150, 5, true, false, true};
    norm(longer);
    scan(longer, 17, 64);
}

}  // namespace

int main() {
    for (int isa = 0; isa <= famba_isa_best(); ++isa) {
        if (!famba_isa_built(isa)) continue;
        for (const int threads : {1, 2}) run_all(isa, threads);
        std::printf("instruction set %d (%d lanes): done\n", isa, famba_isa_lanes(isa));
    }
    std::printf("worst relative error: %.1e in float32, %.1e in bfloat16; %d failures\n", worst[0], worst[1], failures);
    return failures ? 1 : 0;
}
