// Inner products of up to 64 x 64 vectors as a CUDA kernel: every element is read once. A block takes every
// gridDim-th chunk of CHUNK elements of one tensor, its rows go to shared memory as floats, threads multiply tiles of
// 2 x 2 rows over their share of the elements, add up a chunk in float and chunks in double. Launches on the tensors of
// a vector follow one another and add to the block's own sums, which a last kernel adds up in order.
#pragma once

#include "dual.cuh"

namespace commute {

constexpr int GRAM_CHUNK = 64, GRAM_STRIDE = GRAM_CHUNK + 1, GRAM_MOST = 64, GRAM_BLOCKS = 256;
constexpr int GRAM_TILES = GRAM_MOST * GRAM_MOST / 4 / DUAL_THREADS;  // most tiles of a thread

// One tensor of every vector: K of X, M of Y, D if `metric`, K of the subtrahend if factor is not 0.
struct Gram {
    const void* rows[3 * GRAM_MOST + 1];
    unsigned char bf16[3 * GRAM_MOST + 1];
    int64_t size;
    double* sums;  // [blocks, K, M], added to
    int K, M;
    bool metric;
    float factor;  // 1 / (2 eps), or 0 without a subtrahend
};

__device__ inline float gram_read(const Gram& x, int row, int64_t e) {
    return x.bf16[row] ? dual_widen(static_cast<const __nv_bfloat16*>(x.rows[row])[e])
                       : static_cast<const float*>(x.rows[row])[e];
}

// Four elements from e on, 16 (8) bytes at once where they are whole and aligned.
__device__ inline void gram_read4(const Gram& x, int row, int64_t e, float* to) {
    const char* const at = static_cast<const char*>(x.rows[row]) + e * (x.bf16[row] ? 2 : 4);
    if (e + 4 <= x.size && !x.bf16[row] && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
        const float4 v = *reinterpret_cast<const float4*>(at);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if (e + 4 <= x.size && x.bf16[row] && reinterpret_cast<uintptr_t>(at) % 8 == 0) {
        const uint2 v = *reinterpret_cast<const uint2*>(at);
        to[0] = __uint_as_float(v.x << 16), to[1] = __uint_as_float(v.x & 0xffff0000u);
        to[2] = __uint_as_float(v.y << 16), to[3] = __uint_as_float(v.y & 0xffff0000u);
    } else {
        for (int i = 0; i < 4; ++i) to[i] = e + i < x.size ? gram_read(x, row, e + i) : 0.0f;
    }
}

// Shared memory: (K + M, each rounded up to even) GRAM_STRIDE floats, at least 8 DUAL_THREADS.
__global__ void __launch_bounds__(DUAL_THREADS, 1) gram_kernel(Gram x) {
    COMMUTE_SHARED(float, memory);
    const int K = (x.K + 1) / 2 * 2, M = (x.M + 1) / 2 * 2, tiles = K / 2 * (M / 2);
    int groups = 1;  // threads that share a tile, each with every groups-th element
    while (2 * groups * tiles <= DUAL_THREADS && groups < GRAM_CHUNK) groups *= 2;
    const int group = threadIdx.x / tiles, tile = threadIdx.x % tiles;
    const bool spread = tiles < DUAL_THREADS, busy = !spread || group < groups;
    double total[GRAM_TILES][4] = {};
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * GRAM_CHUNK; begin < x.size;
         begin += static_cast<int64_t>(gridDim.x) * GRAM_CHUNK) {
        __syncthreads();  // the chunk before may still be read
        for (int n = threadIdx.x; n < (K + M) * (GRAM_CHUNK / 4); n += DUAL_THREADS) {
            const int row = n / (GRAM_CHUNK / 4), at = n % (GRAM_CHUNK / 4) * 4, vector = row < K ? row : x.K + row - K;
            const bool absent = row < K ? row >= x.K : row - K >= x.M;
            float v[4] = {0.0f, 0.0f, 0.0f, 0.0f}, w[4];
            if (!absent) gram_read4(x, vector, begin + at, v);
            if (!absent && row < K && x.factor != 0.0f) {
                gram_read4(x, x.K + x.M + x.metric + row, begin + at, w);
                for (int i = 0; i < 4; ++i) v[i] = (v[i] - w[i]) * x.factor;
            }
            if (!absent && row < K && x.metric) {
                gram_read4(x, x.K + x.M, begin + at, w);
                for (int i = 0; i < 4; ++i) v[i] *= w[i];
            }
            for (int i = 0; i < 4; ++i) memory[row * GRAM_STRIDE + at + i] = v[i];
        }
        __syncthreads();
        if (!busy) continue;
#pragma unroll
        for (int t = 0; t < GRAM_TILES; ++t) {
            const int own = spread ? tile : threadIdx.x + t * DUAL_THREADS;
            if (own >= tiles || (spread && t)) continue;
            const float* const a = memory + own / (M / 2) * 2 * GRAM_STRIDE;
            const float* const b = memory + (K + own % (M / 2) * 2) * GRAM_STRIDE;
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            for (int e = spread ? group : 0; e < GRAM_CHUNK; e += spread ? groups : 1) {
                const float a0 = a[e], a1 = a[e + GRAM_STRIDE], b0 = b[e], b1 = b[e + GRAM_STRIDE];
                sum[0] += a0 * b0, sum[1] += a0 * b1, sum[2] += a1 * b0, sum[3] += a1 * b1;
            }
            for (int q = 0; q < 4; ++q) total[t][q] += sum[q];
        }
    }
    double* const shared = reinterpret_cast<double*>(memory);
    double* const out = x.sums + static_cast<int64_t>(blockIdx.x) * x.K * x.M;
#pragma unroll
    for (int t = 0; t < GRAM_TILES; ++t) {  // bring the groups of a tile together, then add to the block's sums
        __syncthreads();
        for (int q = 0; q < 4; ++q) shared[threadIdx.x * 4 + q] = total[t][q];
        __syncthreads();
        const int own = threadIdx.x + t * DUAL_THREADS;
        if (own >= tiles || (spread && t)) continue;
        for (int q = 0; q < 4; ++q) {
            const int i = own / (M / 2) * 2 + q / 2, j = own % (M / 2) * 2 + q % 2;
            if (i >= x.K || j >= x.M) continue;
            double sum = 0.0;
            for (int g = 0; g < (spread ? groups : 1); ++g) sum += shared[((spread ? g * tiles : 0) + threadIdx.x) * 4 + q];
            out[i * x.M + j] += sum;
        }
    }
}

// out [count] = sum over blocks of sums [blocks, count], in order.
__global__ void __launch_bounds__(DUAL_THREADS, 1) gram_sums_kernel(const double* sums, double* out, int blocks, int count) {
    for (int i = blockIdx.x * DUAL_THREADS + threadIdx.x; i < count; i += gridDim.x * DUAL_THREADS) {
        double total = 0.0;
        for (int b = 0; b < blocks; ++b) total += sums[static_cast<int64_t>(b) * count + i];
        out[i] = total;
    }
}

// The first of them: the blocks' sums at zero.
__global__ void __launch_bounds__(DUAL_THREADS, 1) gram_clear_kernel(double* sums, int64_t count) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * DUAL_THREADS + threadIdx.x; i < count;
         i += static_cast<int64_t>(gridDim.x) * DUAL_THREADS) {
        sums[i] = 0.0;
    }
}

}  // namespace commute
