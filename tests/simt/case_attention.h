// Dual causal attention: the kernels of csrc/attention*.cuh against sums written out in double.
#pragma once

#include "cases.h"
//
#include "attention_backward.cuh"

namespace cases {

struct AttentionCase {
    int64_t b, a, g, s, c, shift;
};
// One row, tails of tiles and of columns, groups of queries, misaligned rows, a tile that is just full.
inline const AttentionCase ATTENTION_CASES[] = {
    {1, 1, 1, 1, 16, 0}, {1, 2, 1, 33, 20, 0}, {2, 2, 2, 32, 32, 0}, {1, 4, 2, 65, 24, 1}, {1, 1, 1, 40, 32, 3},
};

using Vec = std::vector<double>;

// Value and tangent of what one (batch, head) computes, straight from the definition; rows of `c`.
struct AttentionTruth {
    Vec o, d_o, saved, gq, dgq, gk, dgk, gv, dgv;

    explicit AttentionTruth(const AttentionCase& x)
        : o(x.b * x.a * x.s * x.c),
          d_o(o),
          saved(x.b * x.a * x.s * 2),
          gq(o),
          dgq(o),
          gk(x.b * x.g * x.s * x.c),
          dgk(gk),
          gv(gk),
          dgv(gk) {}
};

inline double dot(const Vec& x, int64_t i, const Vec& y, int64_t j, int64_t c) {
    double sum = 0.0;
    for (int64_t p = 0; p < c; ++p) sum += x[i * c + p] * y[j * c + p];
    return sum;
}

inline void add_row(Vec& to, int64_t i, double w, const Vec& from, int64_t j, int64_t c) {
    for (int64_t p = 0; p < c; ++p) to[i * c + p] += w * from[j * c + p];
}

// in: q, dq, k, dk, v, dv, go, dgo.
inline void attention_row(const AttentionCase& x, double scale, const Vec* in, int64_t head, int64_t i,
                          AttentionTruth& t) {
    const Vec &q = in[0], &dq = in[1], &k = in[2], &dk = in[3], &v = in[4], &dv = in[5], &go = in[6], &dgo = in[7];
    const int64_t row = head * x.s + i, keys = (head / x.a * x.g + head % x.a / (x.a / x.g)) * x.s, c = x.c;
    Vec p(i + 1), dp(i + 1);
    double total = 0.0, mean = 0.0, along = 0.0, dalong = 0.0;
    for (int64_t j = 0; j <= i; ++j) {
        p[j] = std::exp(scale * dot(q, row, k, keys + j, c));
        dp[j] = scale * (dot(dq, row, k, keys + j, c) + dot(q, row, dk, keys + j, c));
        total += p[j];
    }
    for (int64_t j = 0; j <= i; ++j) mean += (p[j] /= total) * dp[j];
    t.saved[2 * row] = std::log(total), t.saved[2 * row + 1] = mean;
    for (int64_t j = 0; j <= i; ++j) {
        dp[j] = p[j] * (dp[j] - mean);
        add_row(t.o, row, p[j], v, keys + j, c);
        add_row(t.d_o, row, dp[j], v, keys + j, c), add_row(t.d_o, row, p[j], dv, keys + j, c);
        const double gp = dot(go, row, v, keys + j, c),
                     dgp = dot(dgo, row, v, keys + j, c) + dot(go, row, dv, keys + j, c);
        along += p[j] * gp, dalong += dp[j] * gp + p[j] * dgp;
    }
    for (int64_t j = 0; j <= i; ++j) {
        const double gp = dot(go, row, v, keys + j, c),
                     dgp = dot(dgo, row, v, keys + j, c) + dot(go, row, dv, keys + j, c);
        const double gs = scale * p[j] * (gp - along), dgs = scale * (dp[j] * (gp - along) + p[j] * (dgp - dalong));
        add_row(t.gq, row, gs, k, keys + j, c);
        add_row(t.dgq, row, dgs, k, keys + j, c), add_row(t.dgq, row, gs, dk, keys + j, c);
        add_row(t.gk, keys + j, gs, q, row, c);
        add_row(t.dgk, keys + j, dgs, q, row, c), add_row(t.dgk, keys + j, gs, dq, row, c);
        add_row(t.gv, keys + j, p[j], go, row, c);
        add_row(t.dgv, keys + j, dp[j], go, row, c), add_row(t.dgv, keys + j, p[j], dgo, row, c);
    }
}

template <class T, int C>
void attention(const AttentionCase& n) {
    using namespace commute;
    const int64_t size = n.b * n.a * n.s * n.c, keys = n.b * n.g * n.s * n.c, rows = n.b * n.a * n.s;
    Buffer<T> q(size, n.shift), dq(size, n.shift), k(keys, n.shift), dk(keys, n.shift), v(keys, n.shift),
        dv(keys, n.shift);
    Buffer<T> go(size, n.shift), dgo(size, n.shift), o(size, n.shift), d_o(size, n.shift), gq(size, n.shift),
        dgq(size, n.shift);
    Buffer<T> gk(keys, n.shift), dgk(keys, n.shift), gv(keys, n.shift), dgv(keys, n.shift);
    Buffer<float> saved(2 * rows), delta(2 * rows);
    uint64_t seed = 1;
    Vec in[8];
    for (Buffer<T>* x : {&q, &dq, &k, &dk, &v, &dv, &go, &dgo}) x->fill(seed), in[seed - 1] = x->values(), ++seed;
    const bool wide_rows = n.shift == 0 && n.c * sizeof(T) % 16 == 0;
    const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n.c)));
    const auto tiles = static_cast<unsigned>((n.s + ATTENTION_TILE - 1) / ATTENTION_TILE);
    const dim3 queries(static_cast<unsigned>(n.b * n.a) * tiles), groups(static_cast<unsigned>(n.b * n.g) * tiles);
    const dim3 threads(ATTENTION_THREADS);
    const auto c = static_cast<int>(n.c);

    const AttentionForward<T> f = {q, dq, k, dk, v, dv, o, d_o, saved, n.a, n.g, n.s, c, scale, wide_rows};
    simt::launch(config, attention_forward_kernel<T, C>, queries, threads, 4 * attention_floats(C, 6, 2), f);
    AttentionTruth truth(n);
    for (int64_t head = 0; head < n.b * n.a; ++head) {
        for (int64_t i = 0; i < n.s; ++i) attention_row(n, scale, in, head, i, truth);
    }
    const double bound =
        sizeof(T) == 4 ? 2e-6 : 8e-3;  // bf16: half an ulp of results, and o enters the backward rounded
    compare("o", o.values(), truth.o, bound), compare("do", d_o.values(), truth.d_o, bound);
    compare("saved", saved.values(), truth.saved, 2e-6);

    simt::launch(config, attention_delta_kernel<T>, dim3(2), threads, 0, (const T*)go.data, (const T*)dgo.data,
                 (const T*)o.data, (const T*)d_o.data, (float*)delta, rows, c);
    const AttentionBackward<T> x = {go,  dgo, q,   dq, k,   dk,  v,   dv,  saved, delta, gq,
                                    dgq, gk,  dgk, gv, dgv, n.a, n.g, n.s, c,     scale, wide_rows};
    simt::launch(config, attention_queries_kernel<T, C>, queries, threads, 4 * attention_floats(C, 8, 2), x);
    simt::launch(config, attention_keys_kernel<T, C>, groups, threads, 4 * attention_floats(C, 8, 4), x);
    // One key alone: its score has gradient zero, so errors are measured against the whole.
    if (n.s > 1) {
        compare("gq", gq.values(), truth.gq, bound), compare("dgq", dgq.values(), truth.dgq, bound);
        compare("gk", gk.values(), truth.gk, bound), compare("dgk", dgk.values(), truth.dgk, bound);
    }
    compare("gv", gv.values(), truth.gv, bound), compare("dgv", dgv.values(), truth.dgv, bound);
}

inline void attention_float() {
    for (const AttentionCase& n : ATTENTION_CASES) attention<float, 32>(n);
}
inline void attention_bf16() {
    for (const AttentionCase& n : ATTENTION_CASES) attention<__nv_bfloat16, 32>(n);
}
inline void attention_columns() {
    attention<float, 64>({1, 1, 1, 34, 64, 0});
    attention<__nv_bfloat16, 128>({1, 1, 1, 33, 128, 0});
}
// For blocks without order between them: every element is written by one block alone.
inline void attention_blocks() { attention<float, 32>({1, 2, 1, 33, 16, 0}); }

}  // namespace cases
