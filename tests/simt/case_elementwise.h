// Norms, activations and cross-entropy of value and tangent: the kernels of csrc against formulas for the value alone,
// differentiated by dual numbers in double.
#pragma once

#include "cases.h"
//
#include "activation.cuh"
#include "cross_entropy.cuh"
#include "norm.cuh"

namespace cases {

// A number and its derivative.
struct Dual {
    double v = 0.0, d = 0.0;
};
inline Dual constant(double v) { return {v, 0.0}; }
inline Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
inline Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
inline Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
inline Dual operator*(double a, Dual b) { return {a * b.v, a * b.d}; }
inline Dual operator/(Dual a, Dual b) { return {a.v / b.v, (a.d - a.v / b.v * b.d) / b.v}; }
inline Dual rise(Dual a) { return {std::exp(a.v), std::exp(a.v) * a.d}; }
inline Dual root(Dual a) { return {std::sqrt(a.v), a.d / (2.0 * std::sqrt(a.v))}; }
inline Dual hyperbolic(Dual a) { return {std::tanh(a.v), (1.0 - std::tanh(a.v) * std::tanh(a.v)) * a.d}; }
inline Dual error_function(Dual a) { return {std::erf(a.v), 2.0 / std::sqrt(M_PI) * std::exp(-a.v * a.v) * a.d}; }

// A tensor and its tangent, drawn at random or to be written.
template <class T>
struct Pair {
    Buffer<T> value, tangent;

    Pair(int64_t n, int64_t shift, uint64_t seed = 0) : value(n, shift), tangent(n, shift) {
        if (seed) value.fill(2 * seed), tangent.fill(2 * seed + 1);
    }
    Dual operator[](int64_t i) const { return {wide(value.data[i]), wide(tangent.data[i])}; }
    void check(const char* name, const std::vector<Dual>& truth, double bound) const {
        std::vector<double> v, d;
        for (const Dual& x : truth) v.push_back(x.v), d.push_back(x.d);
        compare(name, value.values(), v, bound);
        compare((std::string("d") + name).c_str(), tangent.values(), d, bound);
    }
};

template <class T>
constexpr double BOUND = sizeof(T) == 4 ? 2e-6 : 5e-3;  // of the largest element; bf16 rounds to 2e-3 of each

inline bool rows_are_wide(int64_t width, size_t size, int64_t shift) { return shift == 0 && width * size % 16 == 0; }

inline void add_columns(const float* sums, float* a, float* b, float* c, float* d, int64_t pieces, int64_t width,
                        int64_t count) {
    const commute::ColumnSums x = {sums, {a, b, c, d}, pieces, width, count};
    simt::launch(config, commute::dual_columns_kernel, dim3(2), dim3(commute::DUAL_THREADS), 0, x);
}

template <class T>
void norm(int64_t n, int64_t h, int64_t shift, bool layer) {
    using namespace commute;
    Pair<T> x(n * h, shift, 1), weight(h, shift, 2), bias(h, shift, 3), gy(n * h, shift, 4), y(n * h, shift),
        gx(n * h, shift);
    Pair<float> gweight(h, 0), gbias(h, 0);
    Buffer<float> saved(4 * n);
    const float eps = 1e-5f;
    const bool wide_rows = rows_are_wide(h, sizeof(T), shift);
    const NormForward<T> f = {x.value,
                              x.tangent,
                              weight.value,
                              weight.tangent,
                              layer ? bias.value.data : nullptr,
                              layer ? bias.tangent.data : nullptr,
                              y.value,
                              y.tangent,
                              saved,
                              n,
                              h,
                              eps,
                              layer,
                              wide_rows};
    simt::launch(config, norm_forward_kernel<T>, dim3(2), dim3(DUAL_THREADS), 8 * DUAL_WARPS, f);
    const int64_t rows = 2, pieces = (n + rows - 1) / rows;
    Buffer<float> sums(pieces * 4 * h);
    for (const bool shared : {true, false}) {
        const NormBackward<T> b = {gy.value,       gy.tangent, x.value,    x.tangent, saved, weight.value,
                                   weight.tangent, gx.value,   gx.tangent, sums,      n,     h,
                                   rows,           layer,      wide_rows,  shared};
        simt::launch(config, norm_backward_kernel<T>, dim3(static_cast<unsigned>(pieces)), dim3(DUAL_THREADS),
                     16 * DUAL_WARPS + (shared ? 16 * h : 0), b);
        add_columns(sums, gweight.value, gweight.tangent, gbias.value, gbias.tangent, pieces, h, 4);

        std::vector<Dual> ty(n * h), tgx(n * h), tgw(h), tgb(h);
        for (int64_t i = 0; i < n; ++i) {
            Dual mean, square, along, across;
            for (int64_t j = 0; j < h && layer; ++j) mean = mean + (1.0 / h) * x[i * h + j];
            for (int64_t j = 0; j < h; ++j)
                square = square + (1.0 / h) * ((x[i * h + j] - mean) * (x[i * h + j] - mean));
            const Dual r = constant(1.0) / root(square + constant(eps));
            const auto z = [&](int64_t j) { return (x[i * h + j] - mean) * r; };
            for (int64_t j = 0; j < h; ++j) {
                ty[i * h + j] = z(j) * weight[j] + (layer ? bias[j] : Dual{});
                tgw[j] = tgw[j] + gy[i * h + j] * z(j), tgb[j] = tgb[j] + gy[i * h + j];
                if (layer) across = across + (1.0 / h) * (gy[i * h + j] * weight[j]);
                along = along + (1.0 / h) * (gy[i * h + j] * weight[j] * z(j));
            }
            for (int64_t j = 0; j < h; ++j) tgx[i * h + j] = (gy[i * h + j] * weight[j] - across - z(j) * along) * r;
        }
        y.check("y", ty, BOUND<T>), gx.check("gx", tgx, BOUND<T>);
        gweight.check("gweight", tgw, 5e-6), gbias.check("gbias", tgb, 2e-6);
    }
}

// Value and slope of the activation, of silu for swiglu.
inline void activation_at(int kind, Dual x, Dual& value, Dual& slope) {
    const Dual one = constant(1.0);
    if (kind == commute::DUAL_GELU_TANH) {
        const double k = std::sqrt(2.0 / M_PI);
        const Dual t = hyperbolic(k * (x + 0.044715 * (x * x * x)));
        value = 0.5 * (x * (one + t));
        slope = 0.5 * (one + t) + (0.5 * k) * (x * (one - t * t) * (one + (3.0 * 0.044715) * (x * x)));
    } else if (kind == commute::DUAL_GELU_ERF) {
        const Dual below = 0.5 * (one + error_function(std::sqrt(0.5) * x));
        value = x * below;
        slope = below + x * (1.0 / std::sqrt(2.0 * M_PI) * rise(-0.5 * (x * x)));
    } else {
        const Dual s = one / (one + rise(-1.0 * x));
        value = x * s;
        slope = s * (one + x * (one - s));
    }
}

template <class T, int KIND>
void activation(int64_t n, int64_t f, int64_t shift, bool biased) {
    using namespace commute;
    constexpr bool gated = KIND == DUAL_SWIGLU;
    const int64_t width = gated ? 2 * f : f, rows = 2, pieces = (n + rows - 1) / rows;
    const int64_t chunks = (f + DUAL_THREADS * Pack<T>::SIZE - 1) / (DUAL_THREADS * Pack<T>::SIZE);
    Pair<T> x(n * width, shift, 1), bias(width, shift, 2), gy(n * f, shift, 3), y(n * f, shift), gx(n * width, shift);
    Pair<float> gbias(width, 0);
    Buffer<float> sums(pieces * 2 * width);
    const T *const b = biased ? bias.value.data : nullptr, *const db = biased ? bias.tangent.data : nullptr;
    const dim3 grid(static_cast<unsigned>(pieces * chunks)), threads(DUAL_THREADS);
    const bool wide_rows = rows_are_wide(f, sizeof(T), shift);
    const DualActivations<T> forward = {nullptr,   nullptr, x.value, x.tangent, b,    db,     y.value,
                                        y.tangent, nullptr, n,       f,         rows, chunks, wide_rows};
    simt::launch(config, activation_forward_kernel<T, KIND>, grid, threads, 0, forward);
    const DualActivations<T> backward = {
        gy.value, gy.tangent, x.value, x.tangent, b,        db, gx.value, gx.tangent, biased ? sums.data : nullptr,
        n,        f,          rows,    chunks,    wide_rows};
    simt::launch(config, activation_backward_kernel<T, KIND>, grid, threads, 0, backward);
    if (biased) add_columns(sums, gbias.value, gbias.tangent, nullptr, nullptr, pieces, width, 2);

    std::vector<Dual> ty(n * f), tgx(n * width), tgb(width);
    const auto at = [&](int64_t i, int64_t j) { return x[i * width + j] + (biased ? bias[j] : Dual{}); };
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < f; ++j) {
            Dual value, slope;
            activation_at(KIND, at(i, j), value, slope);
            const Dual up = gated ? at(i, f + j) : constant(1.0);
            ty[i * f + j] = value * up;
            tgx[i * width + j] = gy[i * f + j] * slope * up;
            if (gated) tgx[i * width + f + j] = gy[i * f + j] * value;
        }
        for (int64_t j = 0; j < width; ++j) tgb[j] = tgb[j] + tgx[i * width + j];
    }
    y.check("y", ty, BOUND<T>), gx.check("gx", tgx, BOUND<T>);
    if (biased) gbias.check("gbias", tgb, 2e-6);
}

template <class T>
void cross_entropy(int64_t n, int64_t v, int64_t shift) {
    using namespace commute;
    Pair<T> logits(n * v, shift, 1), glogits(n * v, shift);
    Buffer<int64_t> labels(n);
    Buffer<float> statistics(5 * n);
    const int64_t first = 100;  // of this shard of the vocabulary; every third label lies in another
    for (int64_t i = 0; i < n; ++i) labels[i] = i % 3 == 2 ? first + v + i : first + (i * 7) % v;
    const float scale = 0.25f;
    const DualCrossEntropy<T> x = {logits.value,
                                   logits.tangent,
                                   labels,
                                   statistics,
                                   glogits.value,
                                   glogits.tangent,
                                   n,
                                   v,
                                   first,
                                   scale,
                                   rows_are_wide(v, sizeof(T), shift)};
    simt::launch(config, cross_entropy_statistics_kernel<T>, dim3(2), dim3(DUAL_THREADS), 8 * DUAL_WARPS, x);
    simt::launch(config, cross_entropy_backward_kernel<T>, dim3(2), dim3(DUAL_THREADS), 0, x);
    std::vector<Dual> truth(n * v);
    std::vector<double> kept;
    for (int64_t i = 0; i < n; ++i) {
        double top = -INFINITY;
        for (int64_t j = 0; j < v; ++j) top = std::max(top, logits[i * v + j].v);
        Dual total;
        for (int64_t j = 0; j < v; ++j) total = total + rise(logits[i * v + j] - constant(top));
        const int64_t label = labels[i] - first;
        const Dual own = label < v ? logits[i * v + label] : Dual{};
        for (const double number : {top, total.v, total.d, own.v, own.d}) kept.push_back(number);
        for (int64_t j = 0; j < v; ++j) {
            truth[i * v + j] =
                scale * (rise(logits[i * v + j] - constant(top)) / total - constant(j == label ? 1.0 : 0.0));
        }
    }
    compare("statistics", statistics.values(), kept, 2e-6);
    glogits.check("glogits", truth, BOUND<T>);
}

template <class T>
void norms() {
    for (const bool layer : {true, false}) norm<T>(3, 8, 0, layer), norm<T>(1, 5, 0, layer), norm<T>(5, 1043, 1, layer);
    norm<T>(2, 2080, 0, true);
}
template <class T>
void activations() {
    activation<T, commute::DUAL_GELU_TANH>(3, 1032, 0, true), activation<T, commute::DUAL_GELU_TANH>(1, 1, 0, false);
    activation<T, commute::DUAL_GELU_ERF>(5, 13, 1, true), activation<T, commute::DUAL_GELU_ERF>(2, 16, 0, false);
    activation<T, commute::DUAL_SWIGLU>(3, 24, 0, true), activation<T, commute::DUAL_SWIGLU>(2, 37, 1, false);
}
template <class T>
void cross_entropies() {
    cross_entropy<T>(4, 1040, 0), cross_entropy<T>(1, 1, 0), cross_entropy<T>(5, 333, 1);
}
// For blocks without order between them.
inline void elementwise_blocks() {
    norm<float>(3, 8, 0, true), activation<float, commute::DUAL_SWIGLU>(3, 5, 0, true), cross_entropy<float>(3, 9, 0);
}

}  // namespace cases
