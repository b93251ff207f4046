// The CPU arithmetic of dual causal attention. attention.cpp includes this file once for each instruction set, each
// time inside another namespace and with another WIDTH (floats of a vector register), so there is no include guard.
//
// Dual: value and tangent along one direction, d = tangent of. For one head, rows i = queries, columns j <= i = keys:
//     S = scale q k',  dS = scale (dq k' + q dk'),  P = softmax(S),  dP = P (dS - rowsum(P dS)),
//     o = P v,  do = dP v + P dv.
// Tiles of TILE x TILE scores, never the S x S matrix (online softmax: Milakov and Gimelshein 2018; tiled attention:
// Dao et al. 2022). The forward keeps, per query, the running maximum m, l = sum exp(S - m), r = sum exp(S - m) dS and
// two accumulators A = sum exp(S - m) v and B = sum exp(S - m) (dS v + dv). All but m scale by exp(m - m') when the
// maximum grows, and
//     o = A / l,   do = (B - (r / l) A) / l,   log-sum-exp = m + log l,   its tangent = r / l.
// The backward recomputes S and dS from the saved pair: P = exp(S - lse), dP = P (dS - dlse). With gP = go v' and
// delta = rowsum(go o) (tangents dgP, ddelta by the product rule):
//     gS = P (gP - delta),   dgS = dP (gP - delta) + P (dgP - ddelta),
//     gv = P' go,  gq = scale gS k,  gk = scale gS' q,  and their tangents by the product rule.
// In units of one product of S x S x c halved by causality: forward 6, backward 15 (3 of them recompute the scores);
// a plain gradient takes 7 when tiled, 6 when the scores are kept. So 3.0 gradients, the counted floor.

using Vector __attribute__((vector_size(WIDTH * 4), may_alias)) = float;
using Bits __attribute__((vector_size(WIDTH * 4), may_alias)) = int32_t;

// Which part of a product on a diagonal tile is not known to be zero, for rows from i of the result.
enum Part {
    WHOLE,
    COLUMNS_UP_TO_ROW,  // columns beyond the row are not wanted
    INNER_UP_TO_ROW,    // the left factor is zero beyond the row
    INNER_FROM_ROW      // the left factor is zero before the row
};

COMMUTE_INLINE Vector splat(float x) { return x - Vector{}; }

COMMUTE_INLINE Vector select(Bits mask, Vector yes, Vector no) {
    return (Vector)((mask & (Bits)yes) | (~mask & (Bits)no));
}

// exp(x) for x <= 1, at most 2 ulp off; below -87 the result stays at exp(-87) = 1.6e-38, NaN stays NaN.
COMMUTE_INLINE Vector exponential(Vector x) {
    x = select(x < splat(-87.0f), splat(-87.0f), x);
    const Vector shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const Vector shifted = x * 1.44269504f + shifter, n = shifted - shifter;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector y = r * (1.0f / 720.0f) + 1.0f / 120.0f;
    y = y * r + 1.0f / 24.0f;
    y = y * r + 1.0f / 6.0f;
    y = y * r + 0.5f;
    y = (y * r) * r + r + 1.0f;
    return y * (Vector)(((Bits)shifted - (Bits)shifter + 127) << 23);
}

COMMUTE_INLINE float sum(Vector x) {
    float total = 0.0f;
    for (int l = 0; l < WIDTH; ++l) total += x[l];
    return total;
}

COMMUTE_INLINE float largest(Vector x) {
    float top = x[0];
    for (int l = 1; l < WIDTH; ++l) top = top > x[l] ? top : x[l];
    return top;
}

// ROWS x (N vectors) of C (+)= A B and of its tangent dC (+)= dA B + A dB, inner index from k0 to k1.
template <int N, bool FRESH>
COMMUTE_INLINE void block(const Left& left, int64_t i, const Dual& right, int64_t j, const Dual& out, int64_t k0,
                          int64_t k1) {
    Vector C[ROWS][N], D[ROWS][N];
    float *const c = out.value + i * out.stride + j, *const d = out.tangent + i * out.stride + j;
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            C[m][n] = FRESH ? Vector{} : *(const Vector*)(c + m * out.stride + n * WIDTH);
            D[m][n] = FRESH ? Vector{} : *(const Vector*)(d + m * out.stride + n * WIDTH);
        }
    const float *a = left.value + i * left.row + k0 * left.inner, *da = left.tangent + i * left.row + k0 * left.inner;
    const float *b = right.value + k0 * right.stride + j, *db = right.tangent + k0 * right.stride + j;
    for (int64_t k = k0; k < k1; ++k, a += left.inner, da += left.inner, b += right.stride, db += right.stride) {
        Vector B[N], E[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) B[n] = *(const Vector*)(b + n * WIDTH), E[n] = *(const Vector*)(db + n * WIDTH);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
            const Vector x = splat(a[m * left.row]), dx = splat(da[m * left.row]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                C[m][n] += x * B[n];
                D[m][n] += dx * B[n];
                D[m][n] += x * E[n];
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            *(Vector*)(c + m * out.stride + n * WIDTH) = C[m][n];
            *(Vector*)(d + m * out.stride + n * WIDTH) = D[m][n];
        }
}

// out (+)= left right for value and tangent: TILE rows, `columns` columns, inner length `inner`.
template <bool FRESH>
static void multiply(const Left& left, const Dual& right, const Dual& out, int64_t columns, int64_t inner, Part part) {
    for (int64_t i = 0; i < TILE; i += ROWS) {
        const int64_t stop = i + ROWS, k0 = part == INNER_FROM_ROW ? i : 0, k1 = part == INNER_UP_TO_ROW ? stop : inner;
        const int64_t end = part == COLUMNS_UP_TO_ROW && stop < columns ? stop : columns;
        int64_t j = 0;
        for (; j + WIDTH < end; j += 2 * WIDTH) block<2, FRESH>(left, i, right, j, out, k0, k1);
        if (j < end) block<1, FRESH>(left, i, right, j, out, k0, k1);
    }
}

COMMUTE_INLINE Vector* row_of(float* base, int64_t row, int64_t stride) { return (Vector*)(base + row * stride); }

// Column indices of a vector of scores, to compare with the row.
COMMUTE_INLINE Bits columns_from(int64_t first) {
    Bits lane;
    for (int l = 0; l < WIDTH; ++l) lane[l] = (int32_t)(first + l);
    return lane;
}

// One key tile enters the running state of a query tile: scores -> weights p and p dS in place, sums and scales
// updated.
static void softmax_tile(const Dual& score, const Dual& out, Running& state, int64_t columns, bool diagonal) {
    for (int64_t i = 0; i < TILE; ++i) {
        Vector *s = row_of(score.value, i, TILE), *ds = row_of(score.tangent, i, TILE);
        const int64_t n = diagonal ? i / WIDTH + 1 : TILE / WIDTH;
        const Vector lowest = splat(-__builtin_inff());
        if (diagonal) s[n - 1] = select(columns_from((n - 1) * WIDTH) > (int32_t)i, lowest, s[n - 1]);
        Vector top = lowest;
        for (int64_t j = 0; j < n; ++j) top = select(top > s[j], top, s[j]);
        const float maximum = __builtin_fmaxf(state.maximum[i], largest(top));
        Vector total = {}, weighted = {};
        for (int64_t j = 0; j < n; ++j) {
            Vector p = exponential(s[j] - maximum);
            Vector w = p * ds[j];
            if (diagonal && j == n - 1) {
                const Bits known = columns_from(j * WIDTH) <= (int32_t)i;
                p = (Vector)(known & (Bits)p), w = (Vector)(known & (Bits)w);
            }
            total += p, weighted += w;
            s[j] = p, ds[j] = w;
        }
        if (diagonal)
            for (int64_t j = n; j < TILE / WIDTH; ++j) s[j] = ds[j] = Vector{};
        const float scale = state.maximum[i] == maximum ? 1.0f : __builtin_expf(state.maximum[i] - maximum);
        if (scale != 1.0f)
            for (int64_t j = 0; j < columns / WIDTH; ++j)
                row_of(out.value, i, out.stride)[j] *= scale, row_of(out.tangent, i, out.stride)[j] *= scale;
        state.sum[i] = state.sum[i] * scale + sum(total);
        state.weighted[i] = state.weighted[i] * scale + sum(weighted);
        state.maximum[i] = maximum;
    }
}

// Forward of one query tile against key tiles 0..tile. q, v: packed rows; key: packed columns; out: accumulators,
// divided here.
static void forward_tile(const Dual& q, const Dual& key, const Dual& v, const Dual& out, const Dual& score,
                         Running& state, int64_t tile, int64_t columns) {
    const int64_t size = TILE * columns;
    const Left query = {q.value + tile * size, q.tangent + tile * size, columns, 1};
    for (int64_t i = 0; i < TILE; ++i) state.maximum[i] = -__builtin_inff(), state.sum[i] = state.weighted[i] = 0.0f;
    for (int64_t i = 0; i < size; ++i) out.value[i] = out.tangent[i] = 0.0f;
    for (int64_t j = 0; j <= tile; ++j) {
        const bool diagonal = j == tile;
        const Dual keys = {key.value + j * size, key.tangent + j * size, TILE},
                   values = {v.value + j * size, v.tangent + j * size, columns};
        multiply<true>(query, keys, score, TILE, columns, diagonal ? COLUMNS_UP_TO_ROW : WHOLE);
        softmax_tile(score, out, state, columns, diagonal);
        multiply<false>({score.value, score.tangent, TILE, 1}, values, out, columns, TILE,
                        diagonal ? INNER_UP_TO_ROW : WHOLE);
    }
    for (int64_t i = 0; i < TILE; ++i) {
        Vector *o = row_of(out.value, i, columns), *d = row_of(out.tangent, i, columns);
        const float inverse = 1.0f / state.sum[i], mean = state.weighted[i] * inverse;
        for (int64_t j = 0; j < columns / WIDTH; ++j) {
            d[j] = (d[j] - mean * o[j]) * inverse;
            o[j] *= inverse;
        }
    }
}

// Scores and their gradients -> P, dP, gS, dgS in place, for the rows of one query tile.
static void gradient_tile(const Dual& score, const Dual& gradient, const float* lse, const float* delta,
                          bool diagonal) {
    for (int64_t i = 0; i < TILE; ++i) {
        Vector *s = row_of(score.value, i, TILE), *ds = row_of(score.tangent, i, TILE);
        Vector *g = row_of(gradient.value, i, TILE), *dg = row_of(gradient.tangent, i, TILE);
        const int64_t n = diagonal ? i / WIDTH + 1 : TILE / WIDTH;
        for (int64_t j = 0; j < n; ++j) {
            const Vector p = exponential(s[j] - lse[2 * i]), dp = p * (ds[j] - lse[2 * i + 1]), a = g[j] - delta[2 * i];
            dg[j] = dp * a + p * (dg[j] - delta[2 * i + 1]);
            g[j] = p * a, s[j] = p, ds[j] = dp;
        }
        if (!diagonal) continue;
        const Bits known = columns_from((n - 1) * WIDTH) <= (int32_t)i;
        for (Vector* x : {s, ds, g, dg}) {
            x[n - 1] = (Vector)(known & (Bits)x[n - 1]);
            for (int64_t j = n; j < TILE / WIDTH; ++j) x[j] = Vector{};
        }
    }
}

// Backward of one query tile against one key tile: adds to gq of the query tile and to gk, gv of the key tile.
static void backward_tile(const Backward& x, int64_t i, int64_t j, int64_t columns) {
    const int64_t at = i * TILE * columns, from = j * TILE * columns;
    const bool diagonal = i == j;
    const Part inner_from = diagonal ? INNER_FROM_ROW : WHOLE;
    multiply<true>({x.q.value + at, x.q.tangent + at, columns, 1}, {x.key.value + from, x.key.tangent + from, TILE},
                   x.score, TILE, columns, diagonal ? COLUMNS_UP_TO_ROW : WHOLE);
    multiply<true>({x.go.value + at, x.go.tangent + at, columns, 1},
                   {x.value.value + from, x.value.tangent + from, TILE}, x.gradient, TILE, columns,
                   diagonal ? COLUMNS_UP_TO_ROW : WHOLE);
    gradient_tile(x.score, x.gradient, x.lse + 2 * i * TILE, x.delta + 2 * i * TILE, diagonal);
    const Dual &p = x.score, &g = x.gradient;
    multiply<false>({p.value, p.tangent, 1, TILE}, {x.go.value + at, x.go.tangent + at, columns},
                    {x.gv.value + from, x.gv.tangent + from, columns}, columns, TILE, inner_from);
    multiply<false>({g.value, g.tangent, 1, TILE}, {x.q.value + at, x.q.tangent + at, columns},
                    {x.gk.value + from, x.gk.tangent + from, columns}, columns, TILE, inner_from);
    multiply<false>({g.value, g.tangent, TILE, 1}, {x.k.value + from, x.k.tangent + from, columns},
                    {x.gq.value + at, x.gq.tangent + at, columns}, columns, TILE, diagonal ? INNER_UP_TO_ROW : WHOLE);
}
