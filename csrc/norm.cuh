// LayerNorm and RMSNorm of value and tangent as CUDA kernels; norm.cpp has the formulas. One block takes one row at a
// time, thread t the packs t, t + 256, ...: three passes over a row that the first cache holds after the first.
#pragma once

#include "dual.cuh"

namespace commute {

template <class T>
struct NormForward {
    const T *x, *dx, *weight, *dweight, *bias, *dbias;  // bias, dbias may be null
    T *y, *dy;
    float* saved;
    int64_t n, h;
    float eps;
    bool layer, wide;
};

// Shared memory: 2 DUAL_WARPS floats.
template <class T>
__global__ void __launch_bounds__(DUAL_THREADS, 1) norm_forward_kernel(NormForward<T> x) {
    COMMUTE_SHARED(float, memory);
    constexpr int SIZE = Pack<T>::SIZE, STRIDE = DUAL_THREADS * SIZE;
    for (int64_t i = blockIdx.x; i < x.n; i += gridDim.x) {
        const T *const u = x.x + i * x.h, *const du = x.dx + i * x.h;
        float mean[2] = {0.0f, 0.0f}, sums[2] = {0.0f, 0.0f};
        if (x.layer) {
            for (int64_t j = threadIdx.x * SIZE; j < x.h; j += STRIDE) {
                const Pack<T> a = dual_load(u, j, x.h, x.wide), da = dual_load(du, j, x.h, x.wide);
                for (int e = 0; e < SIZE; ++e) mean[0] += a.at[e], mean[1] += da.at[e];
            }
            dual_block(mean, memory);
            mean[0] /= x.h, mean[1] /= x.h;
        }
        for (int64_t j = threadIdx.x * SIZE; j < x.h; j += STRIDE) {
            const Pack<T> a = dual_load(u, j, x.h, x.wide), da = dual_load(du, j, x.h, x.wide);
            for (int e = 0; e < SIZE; ++e) {
                const float c = j + e < x.h ? a.at[e] - mean[0] : 0.0f;
                sums[0] += c * c, sums[1] += c * (da.at[e] - mean[1]);
            }
        }
        dual_block(sums, memory);
        const float r = 1.0f / sqrtf(sums[0] / x.h + x.eps), dr = -r * r * r * (sums[1] / x.h);
        if (threadIdx.x == 0) {
            float* const saved = x.saved + 4 * i;
            saved[0] = mean[0], saved[1] = r, saved[2] = mean[1], saved[3] = dr;
        }
        for (int64_t j = threadIdx.x * SIZE; j < x.h; j += STRIDE) {
            Pack<T> a = dual_load(u, j, x.h, x.wide), da = dual_load(du, j, x.h, x.wide), b = {}, db = {};
            const Pack<T> w = dual_load(x.weight, j, x.h, x.wide), dw = dual_load(x.dweight, j, x.h, x.wide);
            if (x.bias != nullptr) b = dual_load(x.bias, j, x.h, x.wide), db = dual_load(x.dbias, j, x.h, x.wide);
            for (int e = 0; e < SIZE; ++e) {
                const float c = a.at[e] - mean[0], dc = da.at[e] - mean[1];
                a.at[e] = c * r * w.at[e] + b.at[e];
                da.at[e] = (dc * r + c * dr) * w.at[e] + c * r * dw.at[e] + db.at[e];
            }
            dual_store(a, x.y + i * x.h, j, x.h, x.wide);
            dual_store(da, x.dy + i * x.h, j, x.h, x.wide);
        }
    }
}

template <class T>
struct NormBackward {
    const T *gy, *dgy, *x, *dx;
    const float* saved;
    const T *weight, *dweight;
    T *gx, *dgx;
    float* sums;  // [blocks, 4, h]: gweight, dgweight, gbias, dgbias of the block's rows
    int64_t n, h, rows;
    bool layer, wide, shared;  // shared: the sums fit into shared memory while rows are added
};

// Normalised x and gradient times weight, with tangents, of one element.
struct NormElement {
    float z, dz, g, dg;

    __device__ NormElement(const float* saved, float x, float dx, float gy, float dgy, float w, float dw) {
        const float c = x - saved[0], dc = dx - saved[2];
        z = c * saved[1], dz = dc * saved[1] + c * saved[3], g = gy * w, dg = dgy * w + gy * dw;
    }
};

// Block b takes rows b rows .. (b + 1) rows - 1. Shared memory: 4 DUAL_WARPS floats, and 4 h more if `shared`. A thread
// adds up its own columns alone, so they need no barrier.
template <class T>
__global__ void __launch_bounds__(DUAL_THREADS, 1) norm_backward_kernel(NormBackward<T> x) {
    COMMUTE_SHARED(float, memory);
    constexpr int SIZE = Pack<T>::SIZE, STRIDE = DUAL_THREADS * SIZE;
    const int64_t h = x.h, first = blockIdx.x * x.rows, last = first + x.rows < x.n ? first + x.rows : x.n;
    float *const out = x.sums + blockIdx.x * 4 * h, *const sum = x.shared ? memory + 4 * DUAL_WARPS : out;
    for (int64_t j = threadIdx.x * SIZE; j < h; j += STRIDE) {
        for (int64_t e = j; e < j + SIZE && e < h; ++e) sum[e] = sum[h + e] = sum[2 * h + e] = sum[3 * h + e] = 0.0f;
    }
    for (int64_t i = first; i < last; ++i) {
        const T *const u = x.x + i * h, *const du = x.dx + i * h, *const s = x.gy + i * h, *const ds = x.dgy + i * h;
        const float* const kept = x.saved + 4 * i;
        const float saved[4] = {kept[0], kept[1], kept[2], kept[3]};
        float mean[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of g, dg, g z and its tangent
        for (int64_t j = threadIdx.x * SIZE; j < h; j += STRIDE) {
            const Pack<T> a = dual_load(u, j, h, x.wide), da = dual_load(du, j, h, x.wide);
            const Pack<T> o = dual_load(s, j, h, x.wide), d_o = dual_load(ds, j, h, x.wide);
            const Pack<T> w = dual_load(x.weight, j, h, x.wide), dw = dual_load(x.dweight, j, h, x.wide);
            for (int e = 0; e < SIZE; ++e) {
                const NormElement v(saved, a.at[e], da.at[e], o.at[e], d_o.at[e], w.at[e], dw.at[e]);
                mean[0] += v.g, mean[1] += v.dg, mean[2] += v.g * v.z, mean[3] += v.dg * v.z + v.g * v.dz;
            }
        }
        dual_block(mean, memory);
        for (int k = 0; k < 4; ++k) mean[k] = x.layer || k > 1 ? mean[k] / h : 0.0f;
        for (int64_t j = threadIdx.x * SIZE; j < h; j += STRIDE) {
            Pack<T> a = dual_load(u, j, h, x.wide), da = dual_load(du, j, h, x.wide);
            const Pack<T> o = dual_load(s, j, h, x.wide), d_o = dual_load(ds, j, h, x.wide);
            const Pack<T> w = dual_load(x.weight, j, h, x.wide), dw = dual_load(x.dweight, j, h, x.wide);
            for (int e = 0; e < SIZE; ++e) {
                const NormElement v(saved, a.at[e], da.at[e], o.at[e], d_o.at[e], w.at[e], dw.at[e]);
                const float t = v.g - mean[0] - v.z * mean[2];
                const float dt = v.dg - mean[1] - v.dz * mean[2] - v.z * mean[3];
                a.at[e] = t * saved[1], da.at[e] = dt * saved[1] + t * saved[3];
                if (j + e >= h) continue;
                sum[j + e] += o.at[e] * v.z, sum[h + j + e] += d_o.at[e] * v.z + o.at[e] * v.dz;
                sum[2 * h + j + e] += o.at[e], sum[3 * h + j + e] += d_o.at[e];
            }
            dual_store(a, x.gx + i * h, j, h, x.wide);
            dual_store(da, x.dgx + i * h, j, h, x.wide);
        }
    }
    if (!x.shared) return;
    for (int64_t j = threadIdx.x * SIZE; j < h; j += STRIDE) {
        for (int64_t e = j; e < j + SIZE && e < h; ++e) {
            for (int k = 0; k < 4; ++k) out[k * h + e] = sum[k * h + e];
        }
    }
}

}  // namespace commute
