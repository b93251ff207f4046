// Dual causal attention as CUDA kernels; the mathematics is in attention.h. Compiled by nvcc and executed thread by
// thread on the CPU (tests/simt), never run on a GPU. Float arithmetic without tensor cores.
//
// Tiles of TILE x TILE scores; nothing of size s x s is kept. One block owns one tile of what it writes, adds in a
// fixed order and uses no atomics, so results are the same on every run: attention_forward_kernel and
// attention_queries_kernel (gq) own a tile of queries and walk over keys, attention_keys_kernel (gk, gv) owns a tile of
// keys and walks over the queries of all heads of its group. In units of one product of s x s x c halved by causality:
// 6 + 9 + 12 = 27, because both backward kernels recompute scores; a plain tiled gradient written so takes 2 + 3 + 4 =
// 9, hence 3.0 times it.
//
// C, the number of columns in shared memory, is 32, 64 or 128: c rounded up, with zeros. In bf16 the tiles are widened
// when they are loaded. Loads and stores are 16 bytes wide when `wide` (rows begin at multiples of 16 bytes).
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#ifndef COMMUTE_SHARED
#define COMMUTE_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

namespace commute {

constexpr int ATTENTION_TILE = 32, ATTENTION_THREADS = 256,
              ATTENTION_SCORES = 40;  // row stride of scores: no bank twice

template <class T>
struct AttentionForward {
    const T *q, *dq, *k, *dk, *v, *dv;  // q [b, a, s, c]; k, v [b, g, s, c]
    T *o, *d_o;
    float* saved;  // [b, a, s, 2]
    int64_t a, g, s;
    int c;
    float scale;
    bool wide;
};

template <class T>
struct AttentionBackward {
    const T *go, *dgo, *q, *dq, *k, *dk, *v, *dv;
    const float *saved, *delta;  // delta [b, a, s, 2], written by attention_delta_kernel
    T *gq, *dgq, *gk, *dgk, *gv, *dgv;
    int64_t a, g, s;
    int c;
    float scale;
    bool wide;
};

// Floats of shared memory: tiles with four floats between rows against bank conflicts, scores, four numbers a row.
constexpr int attention_floats(int C, int tiles, int scores) {
    return ATTENTION_TILE * (tiles * (C + 4) + scores * ATTENTION_SCORES + 4);
}

struct AttentionPlace {
    int64_t head, first;  // the tile begins at row `first` of this head
};

// Tiles with the most work come first: the last queries, or (reversed) the first keys.
__device__ inline AttentionPlace attention_place(int64_t s, bool reversed) {
    const int64_t tiles = (s + ATTENTION_TILE - 1) / ATTENTION_TILE, block = blockIdx.x, tile = block % tiles;
    return {block / tiles, (reversed ? tiles - 1 - tile : tile) * ATTENTION_TILE};
}

__device__ inline float attention_number(float x) { return x; }
__device__ inline float attention_number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void attention_set(float x, float* to) { *to = x; }
__device__ inline void attention_set(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// 16 bytes of a row -> floats times factor in shared memory.
__device__ inline void attention_widen(const float* from, float factor, float* to) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    *reinterpret_cast<float4*>(to) = make_float4(factor * x.x, factor * x.y, factor * x.z, factor * x.w);
}
__device__ inline void attention_widen(const __nv_bfloat16* from, float factor, float* to) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {x.x, x.y, x.z, x.w};
    float wide[8];
    for (int i = 0; i < 4; ++i) {
        wide[2 * i] = factor * __uint_as_float(words[i] << 16);
        wide[2 * i + 1] = factor * __uint_as_float(words[i] & 0xffff0000u);
    }
    *reinterpret_cast<float4*>(to) = make_float4(wide[0], wide[1], wide[2], wide[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(wide[4], wide[5], wide[6], wide[7]);
}

// Rows first .. of a head [s, c], times factor, into a tile; zeros beyond its edges.
template <int C, class T>
__device__ void attention_load(const T* head, int64_t first, int64_t s, int c, bool wide, float factor, float* tile) {
    constexpr int PER = 16 / sizeof(T), GROUPS = C / PER;
    for (int n = threadIdx.x; n < ATTENTION_TILE * GROUPS; n += ATTENTION_THREADS) {
        const int i = n / GROUPS, p = n % GROUPS * PER;
        float* const to = tile + i * (C + 4) + p;
        const T* const from = head + (first + i) * c + p;
        if (wide && first + i < s && p < c) {
            attention_widen(from, factor, to);
        } else {
            for (int e = 0; e < PER; ++e)
                to[e] = first + i < s && p + e < c ? factor * attention_number(from[e]) : 0.0f;
        }
    }
}

__device__ inline void attention_narrow(float4 x, float* to) { *reinterpret_cast<float4*>(to) = x; }
__device__ inline void attention_narrow(float4 x, __nv_bfloat16* to) {
    __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
}

// C / 32 rows x 4 columns of a result, value or tangent, in the registers of one thread.
template <int C>
struct AttentionSum {
    float4 rows[C / 32];

    __device__ static int row() { return threadIdx.x / (C / 4) * (C / 32); }
    __device__ static int column() { return threadIdx.x % (C / 4) * 4; }
    __device__ void clear() {
        for (int r = 0; r < C / 32; ++r) rows[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    __device__ void add(int r, float x, float4 y) {
        rows[r].x += x * y.x, rows[r].y += x * y.y, rows[r].z += x * y.z, rows[r].w += x * y.w;
    }
    __device__ void multiply(int r, float x) { rows[r].x *= x, rows[r].y *= x, rows[r].z *= x, rows[r].w *= x; }
    template <class T>
    __device__ void store(T* head, int64_t first, int64_t s, int c, bool wide) const {
        const int p = column();
        for (int r = 0; r < C / 32; ++r) {
            const int64_t i = first + row() + r;
            if (i >= s || p >= c) continue;
            if (wide) {
                attention_narrow(rows[r], head + i * c + p);
            } else {
                const float numbers[4] = {rows[r].x, rows[r].y, rows[r].z, rows[r].w};
                for (int e = 0; e < 4 && p + e < c; ++e) attention_set(numbers[e], head + i * c + p + e);
            }
        }
    }
};

// sum += W B, dsum += dW B + W dB for tiles of scores W (read transposed if FLIPPED) and B [TILE, C].
template <int C, bool FLIPPED>
__device__ void attention_accumulate(const float* w, const float* dw, const float* b, const float* db,
                                     AttentionSum<C>& sum, AttentionSum<C>& dsum) {
    const int row = AttentionSum<C>::row(), column = AttentionSum<C>::column();
#pragma unroll 4
    for (int k = 0; k < ATTENTION_TILE; ++k) {
        const float4 B = *reinterpret_cast<const float4*>(b + k * (C + 4) + column);
        const float4 D = *reinterpret_cast<const float4*>(db + k * (C + 4) + column);
#pragma unroll
        for (int r = 0; r < C / 32; ++r) {
            const int at = FLIPPED ? k * ATTENTION_SCORES + row + r : (row + r) * ATTENTION_SCORES + k;
            sum.add(r, w[at], B);
            dsum.add(r, dw[at], B);
            dsum.add(r, w[at], D);
        }
    }
}

__device__ inline float attention_dot(float4 x, float4 y, float sum) {
    return sum + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}

// Four scores of a thread: rows threadIdx.x / 16 + {0, 16}, columns threadIdx.x % 16 + {0, 16}.
struct AttentionScores {
    float value[2][2], tangent[2][2];

    __device__ static int row(int m) { return threadIdx.x / 16 + 16 * m; }
    __device__ static int column(int n) { return threadIdx.x % 16 + 16 * n; }
    __device__ void store(float* w, float* dw) const {
        for (int m = 0; m < 2; ++m) {
            for (int n = 0; n < 2; ++n) {
                w[row(m) * ATTENTION_SCORES + column(n)] = value[m][n];
                dw[row(m) * ATTENTION_SCORES + column(n)] = tangent[m][n];
            }
        }
    }
};

// A B' and its tangent dA B' + A dB' for tiles [TILE, C].
template <int C>
__device__ AttentionScores attention_products(const float* a, const float* da, const float* b, const float* db) {
    AttentionScores x = {};
#pragma unroll 4
    for (int p = 0; p < C; p += 4) {
        float4 A[2], dA[2], B[2], dB[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int i = AttentionScores::row(m) * (C + 4) + p, j = AttentionScores::column(m) * (C + 4) + p;
            A[m] = *reinterpret_cast<const float4*>(a + i), dA[m] = *reinterpret_cast<const float4*>(da + i);
            B[m] = *reinterpret_cast<const float4*>(b + j), dB[m] = *reinterpret_cast<const float4*>(db + j);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                x.value[m][n] = attention_dot(A[m], B[n], x.value[m][n]);
                x.tangent[m][n] = attention_dot(A[m], dB[n], attention_dot(dA[m], B[n], x.tangent[m][n]));
            }
        }
    }
    return x;
}

// Eight neighbouring threads share a row of scores and its running maximum, sum and weighted sum.
struct AttentionRow {
    float maximum = -INFINITY, sum = 0.0f, weighted = 0.0f;

    // Scores -> exp(score - maximum) and that times the tangent, in place; returns the factor of what was summed
    // before.
    __device__ float enter(float* w, float* dw, int64_t row, int64_t column) {
        constexpr int EACH = ATTENTION_TILE / 8;
        float top = maximum, total = 0.0f, along = 0.0f;
        for (int e = 0; e < EACH; ++e) {
            if (column + 8 * e <= row) top = fmaxf(top, w[8 * e]);
        }
        for (int step = 1; step < 8; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
        for (int e = 0; e < EACH; ++e) {
            const bool seen = column + 8 * e <= row;
            const float p = seen ? expf(w[8 * e] - top) : 0.0f, x = seen ? p * dw[8 * e] : 0.0f;
            w[8 * e] = p, dw[8 * e] = x;
            total += p, along += x;
        }
        for (int step = 1; step < 8; step *= 2) {
            total += __shfl_xor_sync(0xffffffffu, total, step);
            along += __shfl_xor_sync(0xffffffffu, along, step);
        }
        const float factor = expf(maximum - top);
        maximum = top, sum = sum * factor + total, weighted = weighted * factor + along;
        return factor;
    }
};

// Grid: b a tiles blocks of ATTENTION_THREADS; shared memory: attention_floats(C, 6, 2) floats.
template <class T, int C>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1) attention_forward_kernel(AttentionForward<T> x) {
    COMMUTE_SHARED(float, memory);
    constexpr int SIZE = ATTENTION_TILE * (C + 4), SCORES = ATTENTION_TILE * ATTENTION_SCORES;
    float *const q = memory, *const dq = q + SIZE, *const k = dq + SIZE, *const dk = k + SIZE, *const v = dk + SIZE;
    float *const dv = v + SIZE, *const w = dv + SIZE, *const dw = w + SCORES, *const rows = dw + SCORES;
    const AttentionPlace place = attention_place(x.s, true);
    const int64_t query = place.head * x.s * x.c;
    const int64_t key = (place.head / x.a * x.g + place.head % x.a / (x.a / x.g)) * x.s * x.c;
    attention_load<C>(x.q + query, place.first, x.s, x.c, x.wide, x.scale, q);
    attention_load<C>(x.dq + query, place.first, x.s, x.c, x.wide, x.scale, dq);
    AttentionSum<C> out, dout;
    out.clear(), dout.clear();
    AttentionRow running;
    const int row = threadIdx.x / 8, column = threadIdx.x % 8, at = row * ATTENTION_SCORES + column;
    for (int64_t first = 0; first <= place.first; first += ATTENTION_TILE) {
        attention_load<C>(x.k + key, first, x.s, x.c, x.wide, 1.0f, k);
        attention_load<C>(x.dk + key, first, x.s, x.c, x.wide, 1.0f, dk);
        attention_load<C>(x.v + key, first, x.s, x.c, x.wide, 1.0f, v);
        attention_load<C>(x.dv + key, first, x.s, x.c, x.wide, 1.0f, dv);
        __syncthreads();
        attention_products<C>(q, dq, k, dk).store(w, dw);
        __syncthreads();
        const float factor = running.enter(w + at, dw + at, place.first + row, first + column);
        if (column == 0) rows[row] = factor;
        __syncthreads();
        for (int r = 0; r < C / 32; ++r) {
            out.multiply(r, rows[out.row() + r]), dout.multiply(r, rows[out.row() + r]);
        }
        attention_accumulate<C, false>(w, dw, v, dv, out, dout);
        __syncthreads();
    }
    const float inverse = 1.0f / running.sum, mean = running.weighted * inverse;
    if (column == 0) {
        rows[2 * row] = inverse, rows[2 * row + 1] = mean;
        if (place.first + row < x.s) {
            float* const pair = x.saved + 2 * (place.head * x.s + place.first + row);
            pair[0] = running.maximum + logf(running.sum), pair[1] = mean;
        }
    }
    __syncthreads();
    for (int r = 0; r < C / 32; ++r) {
        const float* const pair = rows + 2 * (out.row() + r);
        dout.add(r, -pair[1], out.rows[r]);
        out.multiply(r, pair[0]), dout.multiply(r, pair[0]);
    }
    out.store(x.o + query, place.first, x.s, x.c, x.wide);
    dout.store(x.d_o + query, place.first, x.s, x.c, x.wide);
}

}  // namespace commute
