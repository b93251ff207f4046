// Inner products of many vectors at once. Elements of all tensors, laid end to end, are cut into at most 256 pieces that
// depend on their number alone. A piece is read once, block by block: tiles of 4 x 4 rows are multiplied in registers,
// straight from the tensors where their type is that of the sums and nothing is subtracted or weighed, else from a buffer
// that the first cache holds, while the block after next is fetched into the second. Pieces are added up in their order.
//
// Fetches begin at multiples of FETCHED bytes in every row, though blocks do not: with rows at different places of their
// pages a processor of type Zen 4 then reads 16 rows at once as fast as one after another, else a third slower.
//
// Sums are double throughout for float64 tensors and below LEAST_FLOAT elements, where time does not count. Above, the
// processor would wait for double arithmetic and not for memory, so the products of CHAIN elements are added in float,
// 16 a lane, before they are added in double. Measured errors at 2^20 elements and more: 1e-10 |X| |Y| for float32, 2e-8
// for bfloat16. Where a float would overflow or come near its smallest number, the sums are taken again in double.
#include "vectorise.h"

namespace commute {

int64_t pieces_of(int64_t elements) {
    return std::max<int64_t>(1, std::min(PIECES, elements / LEAST_PIECE + (elements % LEAST_PIECE != 0)));
}

Piece piece_of(int64_t elements, int64_t index) {
    const int64_t pieces = pieces_of(elements);
    const int64_t size = (elements / pieces + LEAST_PIECE) / LEAST_PIECE * LEAST_PIECE;
    const auto bounded = [&](int64_t i) { return i > elements / size ? elements : std::min(elements, i * size); };
    return {bounded(index), bounded(index + 1)};
}

namespace {

constexpr int64_t BLOCK = 512;  // elements of every row in a tile
constexpr int64_t CHAIN = 128;  // elements whose products one float register adds up: 16 a lane
constexpr int64_t STEP = 16;    // elements between two fetches
constexpr int64_t FETCHED = 4 * BLOCK;  // bytes, and what their beginning is a multiple of
constexpr int64_t LEAST_FLOAT = 1 << 20;

// Addresses of rows, one block after next; a tile fetches those of from .. to - 1, evenly between its products.
struct Ahead {
    const int64_t* rows;
    int64_t from, to;

    COMMUTE_INLINE void fetch(int64_t element) const {
#if defined(__GNUC__)
        for (int64_t row = from; row < to; ++row) {
            __builtin_prefetch(reinterpret_cast<const void*>(rows[row] + 4 * element), 0, 2);
        }
#endif
    }
};

#if defined(__GNUC__)
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
typedef float HalfFloats __attribute__((vector_size(16)));
COMMUTE_INLINE Doubles add(Doubles total, const Floats& sum) {
    HalfFloats half[2];
    std::memcpy(half, &sum, sizeof(half));
    return total + (__builtin_convertvector(half[0], Doubles) + __builtin_convertvector(half[1], Doubles));
}
COMMUTE_INLINE Doubles add(Doubles total, const Doubles& sum) { return total + sum; }
COMMUTE_INLINE double across(const Doubles& x) { return (x[0] + x[1]) + (x[2] + x[3]); }
#else
using Floats = float;
using Doubles = double;
inline double add(double total, double sum) { return total + sum; }
inline double across(double x) { return x; }
#endif

template <class S>
struct Register {
    using type = Floats;
};
template <>
struct Register<double> {
    using type = Doubles;
};

// out[i, j] += rows a[i] . b[j] over one block. Loops over rows are unrolled by order: sums that GCC keeps in memory
// cost three times as much.
template <int R, int C, class S>
COMMUTE_INLINE void tile(const S* const* a, const S* const* b, const Ahead& ahead, double* out, int64_t M) {
    using V = typename Register<S>::type;
    constexpr int64_t width = sizeof(V) / sizeof(S);
    Doubles total[R][C] = {};
    for (int64_t begin = 0; begin < BLOCK; begin += CHAIN) {
        V sum[R][C] = {};
        for (int64_t step = begin; step < begin + CHAIN; step += STEP) {
            ahead.fetch(step);
            for (int64_t e = step; e < step + STEP; e += width) {
                V left[R], right;
#pragma GCC unroll 4
                for (int i = 0; i < R; ++i) std::memcpy(&left[i], a[i] + e, sizeof(V));
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j) {
                    std::memcpy(&right, b[j] + e, sizeof(V));
#pragma GCC unroll 4
                    for (int i = 0; i < R; ++i) sum[i][j] += left[i] * right;
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) total[i][j] = add(total[i][j], sum[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) out[i * M + j] += across(total[i][j]);
    }
}

// Elements begin .. begin + size - 1 of a tensor, at most a block.
struct Span {
    int64_t tensor, begin, size;
};

struct Tables {
    const int64_t* addresses;  // [rows, tensors]
    const int32_t* dtypes;
    const int64_t* sizes;
    int64_t tensors, K, M;
    bool metric, same;
    double eps;

    int64_t rows() const { return K + M + metric + (eps != 0 ? K : 0); }

    // Where the elements of a row lie as S: in its tensor if it can be, else in `own`, filled up with zeros.
    template <class S>
    COMMUTE_INLINE const S* place(int64_t row, const Span& span, S* own) const {
        const int64_t address = addresses[row * tensors + span.tensor];
        const int32_t dtype = dtypes[row * tensors + span.tensor];
        if (dtype == (sizeof(S) == 4 ? FLOAT32 : FLOAT64) && span.size == BLOCK) {
            return reinterpret_cast<const S*>(address) + span.begin;
        }
        if (dtype == FLOAT32) {
            copy(reinterpret_cast<const float*>(address) + span.begin, span.size, own);
        } else if (dtype == BFLOAT16) {
            copy(reinterpret_cast<const bf16*>(address) + span.begin, span.size, own);
        } else {
            copy(reinterpret_cast<const double*>(address) + span.begin, span.size, own);
        }
        return own;
    }

    template <class T, class S>
    COMMUTE_INLINE static void copy(const T* from, int64_t size, S* to) {
#pragma omp simd
        for (int64_t e = 0; e < size; ++e) to[e] = static_cast<S>(widen(from[e]));
        for (int64_t e = size; e < BLOCK; ++e) to[e] = S(0);
    }
};

// The sums of every piece; S: float or double, the type of the buffer and of the sums of a chain.
template <class S>
struct Gram : Tables {
    int64_t elements;
    double* sums;  // [pieces, K, M]

    COMMUTE_INLINE void operator()(int64_t index) const {
        const Piece piece = piece_of(elements, index);
        double* out = sums + index * K * M;
        std::fill(out, out + K * M, 0.0);
        std::vector<S> buffer(static_cast<size_t>((K + M + 2) * BLOCK));
        std::vector<int64_t> next(static_cast<size_t>(rows()));
        std::vector<const S*> left(static_cast<size_t>(K)), right(static_cast<size_t>(M));
        int64_t start = 0;  // of the tensor among all elements
        for (int64_t tensor = 0; tensor < tensors; start += sizes[tensor++]) {
            const int64_t begin = std::max(piece.begin, start) - start;
            const int64_t end = std::min(piece.end, start + sizes[tensor]) - start;
            for (int64_t e = begin; e < end; e += BLOCK) {
                for (int64_t row = 0; row < rows(); ++row) next[row] = after_next(row, tensor, e);
                const Span span{tensor, e, std::min(BLOCK, end - e)};
                gather(span, buffer.data(), left.data(), right.data());
                multiply(left.data(), same ? left.data() : right.data(), next.data(), out);
            }
        }
    }

    COMMUTE_INLINE int64_t after_next(int64_t row, int64_t tensor, int64_t begin) const {
        const int64_t bytes[] = {4, 2, 8};
        const int64_t address = addresses[row * tensors + tensor];
        return (address + (begin + 2 * BLOCK) * bytes[dtypes[row * tensors + tensor]]) & -FETCHED;
    }

    // Where the rows of the factors lie: in the tensors themselves, or in the buffer where they had to be computed.
    COMMUTE_INLINE void gather(const Span& span, S* buffer, const S** left, const S** right) const {
        S *spare = buffer + (K + M) * BLOCK, *weights = spare + BLOCK;
        const S* metrics = metric ? place(K + M, span, weights) : nullptr;
        for (int64_t k = 0; k < K; ++k) {
            S* own = buffer + k * BLOCK;
            const S* row = left[k] = place(k, span, own);
            if (eps == 0 && !metric) continue;
            left[k] = own;
            if (eps != 0) row = subtract(row, place(K + M + metric + k, span, spare), own);
            if (metric) weigh(row, metrics, own);
        }
        for (int64_t m = 0; m < (same ? 0 : M); ++m) right[m] = place(K + m, span, buffer + (K + m) * BLOCK);
    }

    COMMUTE_INLINE const S* subtract(const S* row, const S* minus, S* to) const {
        const S factor = static_cast<S>(0.5 / eps);
#pragma omp simd
        for (int64_t e = 0; e < BLOCK; ++e) to[e] = (row[e] - minus[e]) * factor;
        return to;
    }

    COMMUTE_INLINE void weigh(const S* row, const S* metrics, S* to) const {
#pragma omp simd
        for (int64_t e = 0; e < BLOCK; ++e) to[e] = row[e] * metrics[e];
    }

    COMMUTE_INLINE void multiply(const S* const* left, const S* const* right, const int64_t* next, double* out) const {
        const int64_t count = ((K + 3) / 4) * ((M + 3) / 4), share = (rows() + count - 1) / count;
        int64_t done = 0;  // rows already fetched
        for (int64_t i = 0; i < K; i += 4) {
            for (int64_t j = same ? i : 0; j < M; j += 4) {
                const Ahead ahead{next, done, std::min(done + share, rows())};
                done = ahead.to;
                corner(left + i, right + j, K - i, M - j, ahead, out + i * M + j);
            }
        }
    }

    // One tile of 4 x 4, or what is left of it at the edges.
    COMMUTE_INLINE void corner(const S* const* a, const S* const* b, int64_t rest, int64_t columns, const Ahead& ahead,
                               double* out) const {
        if (rest >= 4 && columns >= 4) return tile<4, 4>(a, b, ahead, out, M);
        Ahead now = ahead;
        const int64_t high = std::min<int64_t>(rest, 4), wide = std::min<int64_t>(columns, 4);
        for (int64_t i = 0; i < high; i += high == 4 ? 4 : 1) {
            for (int64_t j = 0; j < wide; j += high < 4 && wide == 4 ? 4 : 1) {
                double* to = out + i * M + j;
                if (high == 4) {
                    tile<4, 1>(a + i, b + j, now, to, M);
                } else if (wide == 4) {
                    tile<1, 4>(a + i, b + j, now, to, M);
                } else {
                    tile<1, 1>(a + i, b + j, now, to, M);
                }
                now.to = now.from;
            }
        }
    }
};

// Whether no product of floats overflowed and none that counts came near the smallest float.
bool trustworthy(const double* out, int64_t count, int64_t elements) {
    const double least = static_cast<double>(elements) * 0x1p-120;
    return std::all_of(out, out + count, [&](double x) { return std::isfinite(x) && std::fabs(x) >= least; });
}

template <class S>
void add_up(const Tables& t, int64_t elements, double* out, int threads) {
    const int64_t pieces = pieces_of(elements);
    std::vector<double> sums(static_cast<size_t>(pieces * t.K * t.M));
    run(Gram<S>{t, elements, sums.data()}, pieces, threads);
    for (int64_t i = 0; i < t.K; ++i) {
        for (int64_t j = 0; j < t.M; ++j) {
            const int64_t from = t.same && j < i ? j * t.M + i : i * t.M + j;
            double total = 0;
            for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece * t.K * t.M + from];
            out[i * t.M + j] = total;
        }
    }
}

}  // namespace

void gram_cpu(const int64_t* addresses, const int32_t* dtypes, const int64_t* sizes, int64_t tensors, int64_t K,
              int64_t M, int metric, double eps, int same, double* out, int threads) {
    const Tables t{addresses, dtypes, sizes, tensors, K, M, metric != 0, same != 0, eps};
    int64_t elements = 0;
    for (int64_t tensor = 0; tensor < tensors; ++tensor) elements += sizes[tensor];
    const bool narrow = std::find(dtypes, dtypes + t.rows() * tensors, FLOAT64) == dtypes + t.rows() * tensors;
    if (narrow && elements >= LEAST_FLOAT) {
        add_up<float>(t, elements, out, threads);
        if (trustworthy(out, K * M, elements)) return;
    }
    add_up<double>(t, elements, out, threads);
}

}  // namespace commute
