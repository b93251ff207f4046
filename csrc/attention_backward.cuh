// The backward of dual causal attention as CUDA kernels; attention.cuh says what they compute and how work is divided.
#pragma once

#include "attention.cuh"

namespace commute {

// delta [n, 2] = rowsum(go o) and its tangent rowsum(dgo o + go do), n = b a s rows of c; a warp takes a row.
template <class T>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_delta_kernel(const T* go, const T* dgo, const T* o, const T* d_o, float* delta, int64_t n, int c) {
    const int lane = threadIdx.x % 32;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (ATTENTION_THREADS / 32);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * (ATTENTION_THREADS / 32) + threadIdx.x / 32; i < n;
         i += warps) {
        float along = 0.0f, dalong = 0.0f;
        for (int64_t p = i * c + lane; p < (i + 1) * c; p += 32) {
            const float g = attention_number(go[p]), out = attention_number(o[p]);
            along += g * out;
            dalong += attention_number(dgo[p]) * out + g * attention_number(d_o[p]);
        }
        for (int step = 16; step; step /= 2) {
            along += __shfl_xor_sync(0xffffffffu, along, step);
            dalong += __shfl_xor_sync(0xffffffffu, dalong, step);
        }
        if (lane == 0) delta[2 * i] = along, delta[2 * i + 1] = dalong;
    }
}

// Log-sum-exp, its tangent, delta and its tangent for rows first .. of a head; zero beyond the sequence, where go is
// zero too.
__device__ inline void attention_load_rows(const float* saved, const float* delta, int64_t head, int64_t first,
                                           int64_t s, float* rows) {
    if (threadIdx.x >= ATTENTION_TILE) return;
    const int64_t i = head * s + first + threadIdx.x;
    const bool inside = first + threadIdx.x < s;
    rows[4 * threadIdx.x] = inside ? saved[2 * i] : 0.0f;
    rows[4 * threadIdx.x + 1] = inside ? saved[2 * i + 1] : 0.0f;
    rows[4 * threadIdx.x + 2] = inside ? delta[2 * i] : 0.0f;
    rows[4 * threadIdx.x + 3] = inside ? delta[2 * i + 1] : 0.0f;
}

// Scores and gradients of the weights -> weights P, dP and gradients of the scores gS, dgS; zero where a key is in the
// future.
__device__ inline void attention_gradients(AttentionScores& score, AttentionScores& gradient, const float* rows,
                                           int64_t query, int64_t key) {
    for (int m = 0; m < 2; ++m) {
        const float* const row = rows + 4 * AttentionScores::row(m);
        for (int n = 0; n < 2; ++n) {
            const bool seen = key + AttentionScores::column(n) <= query + AttentionScores::row(m);
            const float p = seen ? expf(score.value[m][n] - row[0]) : 0.0f;
            const float dp = seen ? p * (score.tangent[m][n] - row[1]) : 0.0f;
            const float above = seen ? gradient.value[m][n] - row[2] : 0.0f;
            score.value[m][n] = p, score.tangent[m][n] = dp;
            gradient.value[m][n] = p * above;
            gradient.tangent[m][n] = seen ? dp * above + p * (gradient.tangent[m][n] - row[3]) : 0.0f;
        }
    }
}

// gq of one tile of queries. Grid: b a tiles blocks; shared memory: attention_floats(C, 8, 2) floats.
template <class T, int C>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1) attention_queries_kernel(AttentionBackward<T> x) {
    COMMUTE_SHARED(float, memory);
    constexpr int SIZE = ATTENTION_TILE * (C + 4), SCORES = ATTENTION_TILE * ATTENTION_SCORES;
    float *const q = memory, *const dq = q + SIZE, *const go = dq + SIZE, *const dgo = go + SIZE, *const k = dgo + SIZE;
    float *const dk = k + SIZE, *const v = dk + SIZE, *const dv = v + SIZE, *const g = dv + SIZE,
                 *const dg = g + SCORES;
    float* const rows = dg + SCORES;
    const AttentionPlace place = attention_place(x.s, true);
    const int64_t query = place.head * x.s * x.c;
    const int64_t key = (place.head / x.a * x.g + place.head % x.a / (x.a / x.g)) * x.s * x.c;
    attention_load<C>(x.q + query, place.first, x.s, x.c, x.wide, x.scale, q);
    attention_load<C>(x.dq + query, place.first, x.s, x.c, x.wide, x.scale, dq);
    attention_load<C>(x.go + query, place.first, x.s, x.c, x.wide, 1.0f, go);
    attention_load<C>(x.dgo + query, place.first, x.s, x.c, x.wide, 1.0f, dgo);
    attention_load_rows(x.saved, x.delta, place.head, place.first, x.s, rows);
    AttentionSum<C> sum, dsum;
    sum.clear(), dsum.clear();
    for (int64_t first = 0; first <= place.first; first += ATTENTION_TILE) {
        attention_load<C>(x.k + key, first, x.s, x.c, x.wide, 1.0f, k);
        attention_load<C>(x.dk + key, first, x.s, x.c, x.wide, 1.0f, dk);
        attention_load<C>(x.v + key, first, x.s, x.c, x.wide, 1.0f, v);
        attention_load<C>(x.dv + key, first, x.s, x.c, x.wide, 1.0f, dv);
        __syncthreads();
        AttentionScores score = attention_products<C>(q, dq, k, dk), gradient = attention_products<C>(go, dgo, v, dv);
        attention_gradients(score, gradient, rows, place.first, first);
        gradient.store(g, dg);
        __syncthreads();
        attention_accumulate<C, false>(g, dg, k, dk, sum, dsum);
        __syncthreads();
    }
    for (int r = 0; r < C / 32; ++r) sum.multiply(r, x.scale), dsum.multiply(r, x.scale);
    sum.store(x.gq + query, place.first, x.s, x.c, x.wide);
    dsum.store(x.dgq + query, place.first, x.s, x.c, x.wide);
}

// gk and gv of one tile of keys. Grid: b g tiles blocks; shared memory: attention_floats(C, 8, 4) floats.
template <class T, int C>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1) attention_keys_kernel(AttentionBackward<T> x) {
    COMMUTE_SHARED(float, memory);
    constexpr int SIZE = ATTENTION_TILE * (C + 4), SCORES = ATTENTION_TILE * ATTENTION_SCORES;
    float *const q = memory, *const dq = q + SIZE, *const go = dq + SIZE, *const dgo = go + SIZE, *const k = dgo + SIZE;
    float *const dk = k + SIZE, *const v = dk + SIZE, *const dv = v + SIZE, *const p = dv + SIZE,
                 *const dp = p + SCORES;
    float *const g = dp + SCORES, *const dg = g + SCORES, *const rows = dg + SCORES;
    const AttentionPlace place = attention_place(x.s, false);
    const int64_t key = place.head * x.s * x.c, heads = x.a / x.g;
    attention_load<C>(x.k + key, place.first, x.s, x.c, x.wide, 1.0f, k);
    attention_load<C>(x.dk + key, place.first, x.s, x.c, x.wide, 1.0f, dk);
    attention_load<C>(x.v + key, place.first, x.s, x.c, x.wide, 1.0f, v);
    attention_load<C>(x.dv + key, place.first, x.s, x.c, x.wide, 1.0f, dv);
    AttentionSum<C> gk, dgk, gv, dgv;
    gk.clear(), dgk.clear(), gv.clear(), dgv.clear();
    for (int64_t head = place.head * heads; head < (place.head + 1) * heads; ++head) {
        const int64_t query = head * x.s * x.c;
        for (int64_t first = place.first; first < x.s; first += ATTENTION_TILE) {
            attention_load<C>(x.q + query, first, x.s, x.c, x.wide, x.scale, q);
            attention_load<C>(x.dq + query, first, x.s, x.c, x.wide, x.scale, dq);
            attention_load<C>(x.go + query, first, x.s, x.c, x.wide, 1.0f, go);
            attention_load<C>(x.dgo + query, first, x.s, x.c, x.wide, 1.0f, dgo);
            attention_load_rows(x.saved, x.delta, head, first, x.s, rows);
            __syncthreads();
            AttentionScores score = attention_products<C>(q, dq, k, dk);
            AttentionScores gradient = attention_products<C>(go, dgo, v, dv);
            attention_gradients(score, gradient, rows, first, place.first);
            score.store(p, dp), gradient.store(g, dg);
            __syncthreads();
            attention_accumulate<C, true>(p, dp, go, dgo, gv, dgv);
            attention_accumulate<C, true>(g, dg, q, dq, gk, dgk);
            __syncthreads();
        }
    }
    gk.store(x.gk + key, place.first, x.s, x.c, x.wide), dgk.store(x.dgk + key, place.first, x.s, x.c, x.wide);
    gv.store(x.gv + key, place.first, x.s, x.c, x.wide), dgv.store(x.dgv + key, place.first, x.s, x.c, x.wide);
}

}  // namespace commute
