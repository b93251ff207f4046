// GELU (tanh and erf) and SwiGLU of value and tangent as CUDA kernels; activation.cpp has the formulas. A block takes
// one chunk of columns, a thread one pack of it, and walks over rows.
#pragma once

#include "dual.cuh"

namespace commute {

enum DualActivation : int { DUAL_GELU_TANH = 0, DUAL_GELU_ERF = 1, DUAL_SWIGLU = 2 };

template <class T>
struct DualActivations {
    const T *gy, *dgy, *x, *dx, *bias, *dbias;  // gy, dgy: of the backward; bias, dbias may be null
    T *out, *dout;                              // y, dy, or gx, dgx
    float* sums;                                // [pieces, 2, width of x], null without a bias
    int64_t n, f, rows, chunks;                 // block b: chunk b % chunks of rows b / chunks * rows ..
    bool wide;
};

// f(x), f'(x), f''(x) of the activation, of silu for swiglu.
struct DualSlopes {
    float value, first, second;
};

template <int KIND>
__device__ DualSlopes dual_slopes(float x) {
    if (KIND == DUAL_GELU_ERF) {
        const float P = 0.5f * erfcf(-0.70710678f * x), D = 0.39894228f * expf(-0.5f * x * x);
        return {x * P, P + x * D, D * (2.0f - x * x)};
    }
    constexpr float k = KIND == DUAL_GELU_TANH ? 1.59576912f : 1.0f, c = KIND == DUAL_GELU_TANH ? 0.044715f : 0.0f;
    const float z = k * x * (1.0f + c * x * x), dz = k * (1.0f + 3.0f * c * x * x), ddz = 6.0f * k * c * x;
    const float e = expf(-fabsf(z)), large = 1.0f / (1.0f + e), small = e * large;
    const float s = z < 0.0f ? small : large, rest = z < 0.0f ? large : small;
    const float ds = s * rest, dds = ds * (rest - s);
    return {x * s, s + x * ds * dz, 2.0f * ds * dz + x * (dds * dz * dz + ds * ddz)};
}

// x + bias at columns j .. of a row.
template <class T>
__device__ Pack<T> dual_biased(const T* row, const T* bias, int64_t j, int64_t width, bool wide) {
    Pack<T> found = dual_load(row, j, width, wide);
    if (bias == nullptr) return found;
    const Pack<T> b = dual_load(bias, j, width, wide);
    for (int e = 0; e < Pack<T>::SIZE; ++e) found.at[e] += b.at[e];
    return found;
}

template <class T, int KIND>
__global__ void __launch_bounds__(DUAL_THREADS, 1) activation_forward_kernel(DualActivations<T> x) {
    constexpr int SIZE = Pack<T>::SIZE;
    const int64_t f = x.f, width = KIND == DUAL_SWIGLU ? 2 * f : f, first = blockIdx.x / x.chunks * x.rows;
    const int64_t last = first + x.rows < x.n ? first + x.rows : x.n;
    const int64_t j = (blockIdx.x % x.chunks * DUAL_THREADS + threadIdx.x) * SIZE;
    if (j >= f) return;
    const T *const up_bias = x.bias == nullptr ? nullptr : x.bias + f;
    const T *const dup_bias = x.bias == nullptr ? nullptr : x.dbias + f;
    for (int64_t i = first; i < last; ++i) {
        const T *const u = x.x + i * width, *const du = x.dx + i * width;
        Pack<T> a = dual_biased(u, x.bias, j, f, x.wide), da = dual_biased(du, x.dbias, j, f, x.wide), b, db;
        if (KIND == DUAL_SWIGLU) {
            b = dual_biased(u + f, up_bias, j, f, x.wide), db = dual_biased(du + f, dup_bias, j, f, x.wide);
        }
        for (int e = 0; e < SIZE; ++e) {
            const DualSlopes s = dual_slopes<KIND>(a.at[e]);
            const float y = s.value, dy = s.first * da.at[e];
            a.at[e] = KIND == DUAL_SWIGLU ? y * b.at[e] : y;
            da.at[e] = KIND == DUAL_SWIGLU ? dy * b.at[e] + y * db.at[e] : dy;
        }
        dual_store(a, x.out + i * f, j, f, x.wide);
        dual_store(da, x.dout + i * f, j, f, x.wide);
    }
}

template <class T, int KIND>
__global__ void __launch_bounds__(DUAL_THREADS, 1) activation_backward_kernel(DualActivations<T> x) {
    constexpr int SIZE = Pack<T>::SIZE;
    const int64_t f = x.f, width = KIND == DUAL_SWIGLU ? 2 * f : f, piece = blockIdx.x / x.chunks;
    const int64_t first = piece * x.rows, last = first + x.rows < x.n ? first + x.rows : x.n;
    const int64_t j = (blockIdx.x % x.chunks * DUAL_THREADS + threadIdx.x) * SIZE;
    if (j >= f) return;
    const T *const up_bias = x.bias == nullptr ? nullptr : x.bias + f;
    const T *const dup_bias = x.bias == nullptr ? nullptr : x.dbias + f;
    Pack<T> sum = {}, dsum = {}, up_sum = {}, dup_sum = {};
    for (int64_t i = first; i < last; ++i) {
        const T *const u = x.x + i * width, *const du = x.dx + i * width;
        Pack<T> a = dual_biased(u, x.bias, j, f, x.wide), da = dual_biased(du, x.dbias, j, f, x.wide), b, db;
        const Pack<T> o = dual_load(x.gy + i * f, j, f, x.wide), d_o = dual_load(x.dgy + i * f, j, f, x.wide);
        if (KIND == DUAL_SWIGLU) {
            b = dual_biased(u + f, up_bias, j, f, x.wide), db = dual_biased(du + f, dup_bias, j, f, x.wide);
        }
        for (int e = 0; e < SIZE; ++e) {
            const DualSlopes s = dual_slopes<KIND>(a.at[e]);
            float g = o.at[e] * s.first, dg = d_o.at[e] * s.first + o.at[e] * s.second * da.at[e];
            if (KIND == DUAL_SWIGLU) {
                const float up = b.at[e], dup = db.at[e];
                b.at[e] = o.at[e] * s.value, db.at[e] = d_o.at[e] * s.value + o.at[e] * s.first * da.at[e];
                up_sum.at[e] += b.at[e], dup_sum.at[e] += db.at[e];
                dg = dg * up + g * dup, g *= up;
            }
            a.at[e] = g, da.at[e] = dg;
            sum.at[e] += g, dsum.at[e] += dg;
        }
        dual_store(a, x.out + i * width, j, f, x.wide);
        dual_store(da, x.dout + i * width, j, f, x.wide);
        if (KIND == DUAL_SWIGLU) {
            dual_store(b, x.out + i * width + f, j, f, x.wide);
            dual_store(db, x.dout + i * width + f, j, f, x.wide);
        }
    }
    if (x.sums == nullptr) return;
    float* const to = x.sums + piece * 2 * width;
    for (int e = 0; e < SIZE && j + e < f; ++e) {
        to[j + e] = sum.at[e], to[width + j + e] = dsum.at[e];
        if (KIND == DUAL_SWIGLU) to[f + j + e] = up_sum.at[e], to[width + f + j + e] = dup_sum.at[e];
    }
}

}  // namespace commute
