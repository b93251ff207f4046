// Dual causal attention on the CPU: float32 or bf16 storage, float32 arithmetic, memory linear in the sequence length.
// attention.h has the mathematics. A unit of work is one key head of one sequence with all its query heads, so results
// do not depend on the number of threads.
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "vectorise.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are arguments of inlined functions alone
#endif

namespace commute {
namespace {

constexpr int64_t TILE = 64, ROWS = 4;

// A matrix and its tangent, rows `stride` apart.
struct Dual {
    float *value, *tangent;
    int64_t stride;
};

// The left factor of a product, element (i, k) at i * row + k * inner: either layout is read in place.
struct Left {
    const float *value, *tangent;
    int64_t row, inner;
};

// The online softmax of one query tile.
struct Running {
    float maximum[TILE], sum[TILE], weighted[TILE];
};

// Operands of the backward of one query head; key and value are packed by columns, the rest by rows.
struct Backward {
    Dual q, go, k, key, value, gq, gk, gv, score, gradient;
    const float *lse, *delta;
};

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define COMMUTE_WIDE_TILES 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define WIDTH 16
namespace avx512 {
#include "attention.h"
}
#undef WIDTH
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define WIDTH 8
namespace avx2 {
#include "attention.h"
}
#undef WIDTH
#pragma GCC pop_options
#endif
#define WIDTH 4
namespace portable {
#include "attention.h"
}
#undef WIDTH

struct Tiles {
    decltype(&portable::forward_tile) forward;
    decltype(&portable::backward_tile) backward;
};

// The widest instruction set of this machine that the tests allow.
Tiles tiles_of_this_machine() {
#if defined(COMMUTE_WIDE_TILES)
    if (newest_machine > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return {avx512::forward_tile, avx512::backward_tile};
    }
    if (newest_machine > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return {avx2::forward_tile, avx2::backward_tile};
    }
#endif
    return {portable::forward_tile, portable::backward_tile};
}

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Sizes of one call: `columns` is c in whole vectors of the widest machine, `tiles` the number of tiles of a sequence.
struct Shape {
    int64_t b, a, g, s, c, columns, tiles, rows;
    float scale;

    Shape(int64_t b, int64_t a, int64_t g, int64_t s, int64_t c, double scale)
        : b(b),
          a(a),
          g(g),
          s(s),
          c(c),
          columns(rounded_up(c, 16)),
          tiles((s + TILE - 1) / TILE),
          rows(tiles * TILE),
          scale(static_cast<float>(scale)) {}
    int64_t packed() const { return rows * columns; }
};

// Working memory of one thread, handed out in pieces that begin at 64 bytes.
struct Scratch {
    float* next;

    float* take(int64_t floats) {
        float* const taken = next;
        next += rounded_up(floats, 16);
        return taken;
    }
    Dual pair(int64_t rows, int64_t stride) {
        float* const value = take(rows * stride);
        return {value, take(rows * stride), stride};
    }
};

// Head `index` [s, c] of a tensor -> factor times it in float, rows and columns padded with zeros.
template <class T>
void pack_rows(const void* from, int64_t index, const Shape& shape, float factor, float* to) {
    const T* source = static_cast<const T*>(from) + index * shape.s * shape.c;
    for (int64_t i = 0; i < shape.rows; ++i, to += shape.columns) {
        for (int64_t p = 0; p < shape.columns; ++p) {
            to[p] = i < shape.s && p < shape.c ? factor * widen(source[i * shape.c + p]) : 0.0f;
        }
    }
}

// Packed rows -> for each tile its transpose [columns, TILE].
void pack_columns(const float* rows, const Shape& shape, float* to) {
    for (int64_t tile = 0; tile < shape.tiles; ++tile, rows += TILE * shape.columns) {
        for (int64_t p = 0; p < shape.columns; ++p, to += TILE) {
            for (int64_t i = 0; i < TILE; ++i) to[i] = rows[i * shape.columns + p];
        }
    }
}

// Rows first .. of packed memory -> head `index` of a tensor, times factor; as many as the sequence has, at most
// `count`.
template <class T>
void unpack(const float* from, int64_t index, int64_t first, int64_t count, const Shape& shape, float factor,
            void* to) {
    T* target = static_cast<T*>(to) + index * shape.s * shape.c;
    for (int64_t i = 0; i < count && first + i < shape.s; ++i) {
        for (int64_t p = 0; p < shape.c; ++p) {
            narrow(factor * from[i * shape.columns + p], target + (first + i) * shape.c + p);
        }
    }
}

template <class T>
void pack_dual(const void* value, const void* tangent, int64_t index, const Shape& shape, float factor,
               const Dual& to) {
    pack_rows<T>(value, index, shape, factor, to.value);
    pack_rows<T>(tangent, index, shape, factor, to.tangent);
}

void transpose_dual(const Dual& rows, const Shape& shape, const Dual& to) {
    pack_columns(rows.value, shape, to.value);
    pack_columns(rows.tangent, shape, to.tangent);
}

template <class Unit>
struct Worker {
    const Unit& unit;
    float* memory;
    int64_t floats, workers, units;

    COMMUTE_INLINE void operator()(int64_t worker) const {
        for (int64_t i = worker; i < units; i += workers) unit(i, Scratch{memory + worker * floats});
    }
};

// unit(index, scratch) for every unit, spread over threads; their memory is taken before the first of them starts.
template <class Unit>
void share(const Unit& unit, int64_t units, int64_t floats, int threads) {
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, units));
    std::vector<float> memory(workers * rounded_up(floats, 16) + 16);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    float* const aligned = memory.data() + (rounded_up(address, 64) - address) / sizeof(float);
    run(Worker<Unit>{unit, aligned, rounded_up(floats, 16), workers, units}, workers, threads);
}

template <class T>
void forward(const void* q, const void* dq, const void* k, const void* dk, const void* v, const void* dv, void* o,
             void* d_o, float* saved, const Shape& shape, int threads) {
    const Tiles tiles = tiles_of_this_machine();
    const int64_t heads = shape.a / shape.g, columns = shape.columns;
    const auto unit = [=](int64_t group, Scratch scratch) {
        const Dual score = scratch.pair(TILE, TILE), out = scratch.pair(TILE, columns);
        const Dual query = scratch.pair(shape.rows, columns), key = scratch.pair(shape.rows, columns),
                   value = scratch.pair(shape.rows, columns);
        pack_dual<T>(k, dk, group, shape, 1.0f, query);
        transpose_dual(query, shape, key);
        pack_dual<T>(v, dv, group, shape, 1.0f, value);
        Running state;
        for (int64_t head = group * heads; head < (group + 1) * heads; ++head) {
            pack_dual<T>(q, dq, head, shape, shape.scale, query);
            for (int64_t tile = 0; tile < shape.tiles; ++tile) {
                tiles.forward(query, key, value, out, score, state, tile, columns);
                unpack<T>(out.value, head, tile * TILE, TILE, shape, 1.0f, o);
                unpack<T>(out.tangent, head, tile * TILE, TILE, shape, 1.0f, d_o);
                for (int64_t i = 0; i < TILE && tile * TILE + i < shape.s; ++i) {
                    float* const pair = saved + 2 * (head * shape.s + tile * TILE + i);
                    pair[0] = state.maximum[i] + std::log(state.sum[i]);
                    pair[1] = state.weighted[i] / state.sum[i];
                }
            }
        }
    };
    share(unit, shape.b * shape.g, 6 * shape.packed() + 2 * TILE * (TILE + columns), threads);
}

// lse and delta [rows, 2] of one head, zero beyond the sequence: the padded rows then add nothing to any gradient.
template <class T>
void row_sums(const Dual& go, const void* o, const void* d_o, const float* saved, int64_t head, const Shape& shape,
              float* lse, float* delta) {
    const T *out = static_cast<const T*>(o) + head * shape.s * shape.c,
            *tangent = static_cast<const T*>(d_o) + head * shape.s * shape.c;
    for (int64_t i = 0; i < shape.rows; ++i) {
        float along = 0.0f, dalong = 0.0f;
        for (int64_t p = 0; i < shape.s && p < shape.c; ++p) {
            const float g = go.value[i * shape.columns + p], dg = go.tangent[i * shape.columns + p];
            along += g * widen(out[i * shape.c + p]);
            dalong += dg * widen(out[i * shape.c + p]) + g * widen(tangent[i * shape.c + p]);
        }
        delta[2 * i] = along, delta[2 * i + 1] = dalong;
        lse[2 * i] = i < shape.s ? saved[2 * (head * shape.s + i)] : 0.0f;
        lse[2 * i + 1] = i < shape.s ? saved[2 * (head * shape.s + i) + 1] : 0.0f;
    }
}

void clear(const Dual& x, int64_t floats) {
    std::fill(x.value, x.value + floats, 0.0f);
    std::fill(x.tangent, x.tangent + floats, 0.0f);
}

template <class T>
void unpack_dual(const Dual& from, int64_t index, const Shape& shape, float factor, void* value, void* tangent) {
    unpack<T>(from.value, index, 0, shape.s, shape, factor, value);
    unpack<T>(from.tangent, index, 0, shape.s, shape, factor, tangent);
}

// The arguments of attention_backward_cpu that are tensors.
struct Tensors {
    const void *go, *dgo, *q, *dq, *k, *dk, *v, *dv, *o, *d_o;
    const float* saved;
    void *gq, *dgq, *gk, *dgk, *gv, *dgv;
};

template <class T>
void backward(const Tensors& t, const Shape& shape, int threads) {
    const Tiles tiles = tiles_of_this_machine();
    const int64_t heads = shape.a / shape.g, columns = shape.columns, packed = shape.packed();
    const auto unit = [&, tiles](int64_t group, Scratch scratch) {
        const auto matrix = [&] { return scratch.pair(shape.rows, columns); };
        float *const lse = scratch.take(2 * shape.rows), *const delta = scratch.take(2 * shape.rows);
        const Dual score = scratch.pair(TILE, TILE), gradient = scratch.pair(TILE, TILE);
        const Backward x = {matrix(), matrix(), matrix(), matrix(), matrix(), matrix(),
                            matrix(), matrix(), score,    gradient, lse,      delta};
        pack_dual<T>(t.v, t.dv, group, shape, 1.0f, x.k);
        transpose_dual(x.k, shape, x.value);
        pack_dual<T>(t.k, t.dk, group, shape, 1.0f, x.k);
        transpose_dual(x.k, shape, x.key);
        clear(x.gk, packed), clear(x.gv, packed);
        for (int64_t head = group * heads; head < (group + 1) * heads; ++head) {
            pack_dual<T>(t.q, t.dq, head, shape, shape.scale, x.q);
            pack_dual<T>(t.go, t.dgo, head, shape, 1.0f, x.go);
            row_sums<T>(x.go, t.o, t.d_o, t.saved, head, shape, lse, delta);
            clear(x.gq, packed);
            for (int64_t j = 0; j < shape.tiles; ++j) {
                for (int64_t i = j; i < shape.tiles; ++i) tiles.backward(x, i, j, columns);
            }
            unpack_dual<T>(x.gq, head, shape, shape.scale, t.gq, t.dgq);
        }
        unpack_dual<T>(x.gk, group, shape, 1.0f, t.gk, t.dgk);
        unpack_dual<T>(x.gv, group, shape, 1.0f, t.gv, t.dgv);
    };
    share(unit, shape.b * shape.g, 16 * packed + 4 * shape.rows + 4 * TILE * TILE, threads);
}

void check(int dtype) {
    if (dtype == FLOAT32 || dtype == BFLOAT16) return;
    throw std::invalid_argument("attention is compiled for float32 and bfloat16: use the reference for float64");
}

}  // namespace

void attention_forward_cpu(int dtype, const void* q, const void* dq, const void* k, const void* dk, const void* v,
                           const void* dv, void* o, void* d_o, void* saved, int64_t b, int64_t a, int64_t g, int64_t s,
                           int64_t c, double scale, int threads) {
    check(dtype);
    const Shape shape(b, a, g, s, c, scale);
    const auto function = dtype == BFLOAT16 ? forward<bf16> : forward<float>;
    function(q, dq, k, dk, v, dv, o, d_o, static_cast<float*>(saved), shape, threads);
}

void attention_backward_cpu(int dtype, const void* go, const void* dgo, const void* q, const void* dq, const void* k,
                            const void* dk, const void* v, const void* dv, const void* o, const void* d_o,
                            const void* saved, void* gq, void* dgq, void* gk, void* dgk, void* gv, void* dgv, int64_t b,
                            int64_t a, int64_t g, int64_t s, int64_t c, double scale, int threads) {
    check(dtype);
    const Tensors tensors = {go, dgo, q,  dq,  k,  dk, v, dv, o, d_o, static_cast<const float*>(saved),
                             gq, dgq, gk, dgk, gv, dgv};
    const auto function = dtype == BFLOAT16 ? backward<bf16> : backward<float>;
    function(tensors, Shape(b, a, g, s, c, scale), threads);
}

}  // namespace commute
