// Softmax cross-entropy of value and tangent as CUDA kernels; cross_entropy.cpp has the formulas. One block takes one
// token at a time; statistics are gathered in one read, each thread carrying a maximum of its own.
#pragma once

#include "dual.cuh"

namespace commute {

template <class T>
struct DualCrossEntropy {
    const T *logits, *dlogits;
    const int64_t* labels;
    float* statistics;  // [n, 5], written by the first kernel, read by the second
    T *glogits, *dglogits;
    int64_t n, v, first;
    float scale;
    bool wide;
};

// Shared memory: 2 DUAL_WARPS floats.
template <class T>
__global__ void __launch_bounds__(DUAL_THREADS, 1) cross_entropy_statistics_kernel(DualCrossEntropy<T> x) {
    COMMUTE_SHARED(float, memory);
    constexpr int SIZE = Pack<T>::SIZE;
    for (int64_t i = blockIdx.x; i < x.n; i += gridDim.x) {
        const T *const l = x.logits + i * x.v, *const dl = x.dlogits + i * x.v;
        float top[1] = {-INFINITY}, sums[2] = {0.0f, 0.0f};
        for (int64_t j = threadIdx.x * SIZE; j < x.v; j += DUAL_THREADS * SIZE) {
            const Pack<T> a = dual_load(l, j, x.v, x.wide), da = dual_load(dl, j, x.v, x.wide);
            float high = top[0];
            for (int e = 0; e < SIZE; ++e) high = j + e < x.v && a.at[e] > high ? a.at[e] : high;
            const float base = high == -INFINITY ? 0.0f : high, shrink = expf(top[0] - base);
            sums[0] *= shrink, sums[1] *= shrink, top[0] = high;
            for (int e = 0; e < SIZE; ++e) {
                const float p = j + e < x.v ? expf(a.at[e] - base) : 0.0f;
                sums[0] += p, sums[1] += p * da.at[e];
            }
        }
        const float own = top[0];
        dual_block<1, true>(top, memory);
        const float shrink = own == -INFINITY ? 1.0f : expf(own - top[0]);  // sums of nothing are 0, of NaN stay NaN
        sums[0] *= shrink, sums[1] *= shrink;
        dual_block(sums, memory);
        if (threadIdx.x) continue;
        const int64_t label = x.labels[i] - x.first;
        const bool here = x.labels[i] >= x.first && label < x.v;
        float* const out = x.statistics + 5 * i;
        out[0] = top[0], out[1] = sums[0], out[2] = sums[1];
        out[3] = here ? dual_widen(l[label]) : 0.0f, out[4] = here ? dual_widen(dl[label]) : 0.0f;
    }
}

template <class T>
__global__ void __launch_bounds__(DUAL_THREADS, 1) cross_entropy_backward_kernel(DualCrossEntropy<T> x) {
    constexpr int SIZE = Pack<T>::SIZE;
    for (int64_t i = blockIdx.x; i < x.n; i += gridDim.x) {
        const T *const l = x.logits + i * x.v, *const dl = x.dlogits + i * x.v;
        const float* const in = x.statistics + 5 * i;
        const float maximum = in[0], factor = x.scale / in[1], mean = in[2] / in[1];
        const int64_t label = x.labels[i] - x.first;
        for (int64_t j = threadIdx.x * SIZE; j < x.v; j += DUAL_THREADS * SIZE) {
            Pack<T> a = dual_load(l, j, x.v, x.wide), da = dual_load(dl, j, x.v, x.wide);
            for (int e = 0; e < SIZE; ++e) {
                const float p = expf(a.at[e] - maximum) * factor;
                a.at[e] = p - (j + e == label ? x.scale : 0.0f), da.at[e] = p * (da.at[e] - mean);
            }
            dual_store(a, x.glogits + i * x.v, j, x.v, x.wide);
            dual_store(da, x.dglogits + i * x.v, j, x.v, x.wide);
        }
    }
}

}  // namespace commute
