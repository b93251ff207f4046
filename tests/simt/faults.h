// Kernels with one planted fault each, and beside most of them the same kernel without it.
#pragma once

#include "cases.h"

namespace faults {

// Reverses a block through shared memory.
template <bool BARRIER>
__global__ void reverse(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
}

// Shared memory is written again before every thread has read it.
template <bool BARRIER>
__global__ void rounds(const float* x, float* y) {
    __shared__ float s[64];
    float sum = 0.0f;
    for (int k = 0; k < 4; ++k) {
        s[threadIdx.x] = k + x[threadIdx.x];
        __syncthreads();
        sum += s[(threadIdx.x + 33) % 64];
        if (BARRIER) __syncthreads();
    }
    y[threadIdx.x] = sum;
}

// Neighbours of a warp exchange through shared memory.
template <bool BARRIER>
__global__ void neighbours(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncwarp();
    y[threadIdx.x] = s[threadIdx.x ^ 1];
}

// Every block writes the same elements (false) or its own (true).
template <bool OWN>
__global__ void blocks(const float* x, float* y) {
    if (threadIdx.x < 32) y[(OWN ? blockIdx.x * 32 : 0) + threadIdx.x] = x[threadIdx.x];
}

__global__ void past_global(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + (threadIdx.x == 63)]; }

__global__ void past_static(const float* x, float* y) {
    __shared__ float s[64];
    for (int i = threadIdx.x; i <= 64; i += 64) s[i] = x[0];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

__global__ void past_dynamic(const float* x, float* y) {
    COMMUTE_SHARED(float, s);
    s[threadIdx.x + 1] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void misaligned(const float* x, float* y) {
    const float4 four = *reinterpret_cast<const float4*>(x + 1 + threadIdx.x % 4 * 4);
    y[threadIdx.x] = four.x + four.w;
}

__global__ void some_arrive(const float* x, float* y) {
    if (threadIdx.x < 40) __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void two_barriers(const float* x, float* y) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        y[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
    }
}

__global__ void half_mask(const float* x, float* y) {
    y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 1);
}

__global__ void outside_mask(const float* x, float* y) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_down_sync(0x0000ffffu, x[threadIdx.x], 8);
}

struct Planted {
    const char* name;
    void (*kernel)(const float*, float*);
    unsigned blocks;
    size_t bytes;
    bool unordered;
};

inline const Planted ALL[] = {
    {"barrier", reverse<false>, 1, 0, false},
    {"barrier_ok", reverse<true>, 1, 0, false},
    {"loop_barrier", rounds<false>, 1, 0, false},
    {"loop_barrier_ok", rounds<true>, 1, 0, false},
    {"syncwarp", neighbours<false>, 1, 0, false},
    {"syncwarp_ok", neighbours<true>, 1, 0, false},
    {"blocks", blocks<false>, 2, 0, true},
    {"blocks_ok", blocks<true>, 2, 0, true},
    {"shared_blocks_ok", reverse<true>, 2, 0, false},
    {"past_global", past_global, 1, 0, false},
    {"past_static", past_static, 1, 0, false},
    {"past_dynamic", past_dynamic, 1, 256, false},
    {"misaligned", misaligned, 1, 0, false},
    {"some_arrive", some_arrive, 1, 0, false},
    {"two_barriers", two_barriers, 1, 0, false},
    {"half_mask", half_mask, 1, 0, false},
    {"outside_mask", outside_mask, 1, 0, false},
};

// Prints the sum of results weighted by position, so that a wrong order of threads shows.
inline bool run(const char* name) {
    for (const Planted& fault : ALL) {
        if (std::strcmp(fault.name, name)) continue;
        cases::Buffer<float> x(64), y(64);
        for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i), y[i] = 0.0f;
        simt::Config config = cases::config;
        config.unordered_blocks = fault.unordered;
        simt::launch(config, fault.kernel, dim3(fault.blocks), dim3(64), fault.bytes, (const float*)x.data, y.data);
        double sum = 0.0;
        for (int i = 0; i < 64; ++i) sum += (i + 1) * static_cast<double>(y[i]);
        printf("result %.17g\n", sum);
        return true;
    }
    return false;
}

}  // namespace faults
