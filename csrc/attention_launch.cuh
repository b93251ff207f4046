// Host launchers of the attention kernels: sizes of grids and shared memory, the choice among compiled column counts.
// For a .cu file compiled by nvcc. Each returns a cudaError_t; cudaErrorInvalidValue where c > 128, for which there is
// no kernel.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "attention_backward.cuh"

namespace commute {

// Rows begin at multiples of 16 bytes in every tensor.
template <class T>
bool attention_wide(int64_t c, std::initializer_list<const void*> tensors) {
    if (c * sizeof(T) % 16) return false;
    for (const void* tensor : tensors) {
        if (reinterpret_cast<uintptr_t>(tensor) % 16) return false;
    }
    return true;
}

// One block for each tile of each of `heads` heads.
template <class Arguments>
cudaError_t attention_launch(void (*kernel)(Arguments), const Arguments& x, int64_t heads, int floats,
                             cudaStream_t stream) {
    const int64_t blocks = heads * ((x.s + ATTENTION_TILE - 1) / ATTENTION_TILE);
    if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
    const int bytes = floats * static_cast<int>(sizeof(float));
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    kernel<<<static_cast<unsigned>(blocks), ATTENTION_THREADS, bytes, stream>>>(x);
    return cudaGetLastError();
}

template <class T, int C>
cudaError_t attention_forward_with(const AttentionForward<T>& x, int64_t b, cudaStream_t stream) {
    return attention_launch(attention_forward_kernel<T, C>, x, b * x.a, attention_floats(C, 6, 2), stream);
}

template <class T, int C>
cudaError_t attention_backward_with(const AttentionBackward<T>& x, int64_t b, cudaStream_t stream) {
    const cudaError_t status =
        attention_launch(attention_queries_kernel<T, C>, x, b * x.a, attention_floats(C, 8, 2), stream);
    if (status != cudaSuccess) return status;
    return attention_launch(attention_keys_kernel<T, C>, x, b * x.g, attention_floats(C, 8, 4), stream);
}

// Arguments as attention_forward_cpu's, T float or __nv_bfloat16.
template <class T>
cudaError_t attention_forward_cuda(const T* q, const T* dq, const T* k, const T* dk, const T* v, const T* dv, T* o,
                                   T* d_o, float* saved, int64_t b, int64_t a, int64_t g, int64_t s, int64_t c,
                                   double scale, cudaStream_t stream) {
    const bool wide = attention_wide<T>(c, {q, dq, k, dk, v, dv, o, d_o});
    const AttentionForward<T> x = {
        q, dq, k, dk, v, dv, o, d_o, saved, a, g, s, static_cast<int>(c), static_cast<float>(scale), wide};
    if (c <= 32) return attention_forward_with<T, 32>(x, b, stream);
    if (c <= 64) return attention_forward_with<T, 64>(x, b, stream);
    if (c <= 128) return attention_forward_with<T, 128>(x, b, stream);
    return cudaErrorInvalidValue;
}

// Arguments as attention_backward_cpu's, and delta [b, a, s, 2], memory to work in.
template <class T>
cudaError_t attention_backward_cuda(const T* go, const T* dgo, const T* q, const T* dq, const T* k, const T* dk,
                                    const T* v, const T* dv, const T* o, const T* d_o, const float* saved, float* delta,
                                    T* gq, T* dgq, T* gk, T* dgk, T* gv, T* dgv, int64_t b, int64_t a, int64_t g,
                                    int64_t s, int64_t c, double scale, cudaStream_t stream) {
    constexpr int64_t WARPS = ATTENTION_THREADS / 32, MOST_BLOCKS = 4096;
    const int64_t rows = b * a * s, blocks = (rows + WARPS - 1) / WARPS;
    attention_delta_kernel<T>
        <<<static_cast<unsigned>(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS), ATTENTION_THREADS, 0, stream>>>(
            go, dgo, o, d_o, delta, rows, static_cast<int>(c));
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
    const bool wide = attention_wide<T>(c, {go, dgo, q, dq, k, dk, v, dv, gq, dgq, gk, dgk, gv, dgv});
    const AttentionBackward<T> x = {go,
                                    dgo,
                                    q,
                                    dq,
                                    k,
                                    dk,
                                    v,
                                    dv,
                                    saved,
                                    delta,
                                    gq,
                                    dgq,
                                    gk,
                                    dgk,
                                    gv,
                                    dgv,
                                    a,
                                    g,
                                    s,
                                    static_cast<int>(c),
                                    static_cast<float>(scale),
                                    wide};
    if (c <= 32) return attention_backward_with<T, 32>(x, b, stream);
    if (c <= 64) return attention_backward_with<T, 64>(x, b, stream);
    if (c <= 128) return attention_backward_with<T, 128>(x, b, stream);
    return cudaErrorInvalidValue;
}

}  // namespace commute
