// What the CUDA kernels on dual numbers share: 16-byte loads and stores with a scalar tail, sums over a block. Compiled
// by nvcc and executed thread by thread on the CPU (tests/simt), never run on a GPU. No header of torch, no atomics:
// every sum is taken in an order that the sizes alone decide.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#ifndef COMMUTE_SHARED
#define COMMUTE_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

namespace commute {

constexpr int DUAL_THREADS = 256, DUAL_WARPS = DUAL_THREADS / 32;

// 16 bytes of T as floats.
template <class T>
struct Pack {
    static constexpr int SIZE = 16 / sizeof(T);
    float at[SIZE];
};

__device__ inline float dual_widen(float x) { return x; }
__device__ inline float dual_widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void dual_narrow(float x, float* to) { *to = x; }
__device__ inline void dual_narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

__device__ inline void dual_load_wide(const float* from, Pack<float>& to) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to.at[0] = x.x, to.at[1] = x.y, to.at[2] = x.z, to.at[3] = x.w;
}
__device__ inline void dual_load_wide(const __nv_bfloat16* from, Pack<__nv_bfloat16>& to) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {x.x, x.y, x.z, x.w};
    for (int i = 0; i < 4; ++i) {
        to.at[2 * i] = __uint_as_float(words[i] << 16);
        to.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ inline void dual_store_wide(const Pack<float>& x, float* to) {
    *reinterpret_cast<float4*>(to) = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
}
__device__ inline void dual_store_wide(const Pack<__nv_bfloat16>& x, __nv_bfloat16* to) {
    unsigned words[4];
    for (int i = 0; i < 4; ++i) {
        const unsigned low = __bfloat16_as_ushort(__float2bfloat16_rn(x.at[2 * i]));
        words[i] = low | static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(x.at[2 * i + 1]))) << 16;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Elements j .. of a row that ends at `width`, zeros beyond; wide: the row begins at a multiple of 16 bytes.
template <class T>
__device__ Pack<T> dual_load(const T* row, int64_t j, int64_t width, bool wide) {
    Pack<T> found;
    if (wide && j + Pack<T>::SIZE <= width) {
        dual_load_wide(row + j, found);
    } else {
        for (int e = 0; e < Pack<T>::SIZE; ++e) found.at[e] = j + e < width ? dual_widen(row[j + e]) : 0.0f;
    }
    return found;
}

template <class T>
__device__ void dual_store(const Pack<T>& x, T* row, int64_t j, int64_t width, bool wide) {
    if (wide && j + Pack<T>::SIZE <= width) {
        dual_store_wide(x, row + j);
    } else {
        for (int e = 0; e < Pack<T>::SIZE; ++e) {
            if (j + e < width) dual_narrow(x.at[e], row + j + e);
        }
    }
}

// Sums (or, MAXIMUM, maxima) over the block, in every thread; memory: N DUAL_WARPS floats of shared memory.
template <int N, bool MAXIMUM = false>
__device__ void dual_block(float (&x)[N], float* memory) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int n = 0; n < N; ++n) {
        for (int step = 16; step; step /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, x[n], step);
            x[n] = MAXIMUM ? (x[n] > other ? x[n] : other) : x[n] + other;
        }
    }
    __syncthreads();  // the memory may still be read for an earlier sum
    if (lane == 0) {
        for (int n = 0; n < N; ++n) memory[n * DUAL_WARPS + warp] = x[n];
    }
    __syncthreads();
    for (int n = 0; n < N; ++n) {
        float total = memory[n * DUAL_WARPS];
        for (int w = 1; w < DUAL_WARPS; ++w) {
            const float other = memory[n * DUAL_WARPS + w];
            total = MAXIMUM ? (total > other ? total : other) : total + other;
        }
        x[n] = total;
    }
}

// to[k][j] = sum over pieces of sums[piece, k, j] where to[k] is not null; a thread takes one (k, j).
struct ColumnSums {
    const float* sums;
    float* to[4];
    int64_t pieces, width, count;
};

__global__ void __launch_bounds__(DUAL_THREADS, 1) dual_columns_kernel(ColumnSums x) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * DUAL_THREADS;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * DUAL_THREADS + threadIdx.x; i < x.count * x.width;
         i += stride) {
        const int64_t k = i / x.width, j = i % x.width;
        float* to = nullptr;
        for (int n = 0; n < 4; ++n) to = n == k ? x.to[n] : to;
        if (to == nullptr) continue;
        double total = 0.0;
        for (int64_t piece = 0; piece < x.pieces; ++piece) total += x.sums[(piece * x.count + k) * x.width + j];
        to[j] = static_cast<float>(total);
    }
}

}  // namespace commute
