// Inner products of many vectors at once, and displaced copies. Elements of all tensors, laid end to end, are cut into
// at most 256 pieces that depend on their number alone; a piece is read once, block by block: rows become double in a
// buffer the cache holds, tiles of rows are multiplied in registers, and the pieces are added up in their order.
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

constexpr int64_t WIDTH = 4;    // doubles of one vector register
constexpr int64_t BLOCK = 256;  // elements of every row in the buffer

#if defined(__GNUC__)
typedef double Lanes __attribute__((vector_size(8 * WIDTH)));
COMMUTE_INLINE void multiply_add(const Lanes& a, const Lanes& b, Lanes* sum) { *sum += a * b; }
#else
struct Lanes {
    double lane[WIDTH];
    double operator[](int64_t l) const { return lane[l]; }
};
inline void multiply_add(const Lanes& a, const Lanes& b, Lanes* sum) {
    for (int64_t l = 0; l < WIDTH; ++l) sum->lane[l] += a.lane[l] * b.lane[l];
}
#endif

// out[i, j] += rows a[i] . b[j] over `size` elements, a multiple of WIDTH.
template <int R, int C>
COMMUTE_INLINE void tile(const double* a, const double* b, int64_t size, double* out, int64_t M) {
    Lanes sum[R][C] = {};
    for (int64_t e = 0; e < size; e += WIDTH) {
        Lanes left[R], right;
        for (int i = 0; i < R; ++i) std::memcpy(&left[i], a + i * BLOCK + e, sizeof(Lanes));
        for (int j = 0; j < C; ++j) {
            std::memcpy(&right, b + j * BLOCK + e, sizeof(Lanes));
            for (int i = 0; i < R; ++i) multiply_add(left[i], right, &sum[i][j]);
        }
    }
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < C; ++j) {
            double total = 0;
            for (int64_t l = 0; l < WIDTH; ++l) total += sum[i][j][l];
            out[i * M + j] += total;
        }
    }
}

template <int R>
COMMUTE_INLINE void tiles(const double* a, const double* b, int64_t size, double* out, int64_t M, int64_t from) {
    int64_t j = from;
    for (; j + 4 <= M; j += 4) tile<R, 4>(a, b + j * BLOCK, size, out + j, M);
    for (; j + 2 <= M; j += 2) tile<R, 2>(a, b + j * BLOCK, size, out + j, M);
    if (j < M) tile<R, 1>(a, b + j * BLOCK, size, out + j, M);
}

struct Tables {
    const int64_t* addresses;  // [rows, tensors]
    const int32_t* dtypes;
    const int64_t* sizes;
    int64_t tensors, K, M;
    bool metric, same;
    double eps;

    COMMUTE_INLINE void read(int64_t row, int64_t tensor, int64_t begin, int64_t size, double* to) const {
        const int64_t address = addresses[row * tensors + tensor];
        const int32_t dtype = dtypes[row * tensors + tensor];
        if (dtype == FLOAT32) return copy(reinterpret_cast<const float*>(address) + begin, size, to);
        if (dtype == BFLOAT16) return copy(reinterpret_cast<const bf16*>(address) + begin, size, to);
        copy(reinterpret_cast<const double*>(address) + begin, size, to);
    }

    template <class T>
    COMMUTE_INLINE static void copy(const T* from, int64_t size, double* to) {
#pragma omp simd
        for (int64_t e = 0; e < size; ++e) to[e] = widen(from[e]);
    }
};

struct Gram : Tables {
    int64_t elements;
    double* sums;  // [pieces, K, M]

    COMMUTE_INLINE void operator()(int64_t index) const {
        const Piece piece = piece_of(elements, index);
        double* out = sums + index * K * M;
        std::fill(out, out + K * M, 0.0);
        std::vector<double> buffer(static_cast<size_t>((K + (same ? 0 : M) + 1) * BLOCK));
        int64_t start = 0;  // of the tensor among all elements
        for (int64_t tensor = 0; tensor < tensors; start += sizes[tensor++]) {
            const int64_t begin = std::max(piece.begin, start) - start;
            const int64_t end = std::min(piece.end, start + sizes[tensor]) - start;
            for (int64_t e = begin; e < end; e += BLOCK) block(tensor, e, std::min(BLOCK, end - e), buffer.data(), out);
        }
    }

    COMMUTE_INLINE void block(int64_t tensor, int64_t begin, int64_t size, double* buffer, double* out) const {
        double *spare = buffer, *left = buffer + BLOCK, *right = same ? left : left + K * BLOCK;
        const int64_t padded = (size + WIDTH - 1) / WIDTH * WIDTH, rows = same ? K : K + M;
        for (int64_t row = 0; row < rows; ++row) {
            read(row, tensor, begin, size, left + row * BLOCK);
            std::fill(left + row * BLOCK + size, left + row * BLOCK + padded, 0.0);
        }
        if (eps > 0) subtract(tensor, begin, size, spare, left);
        if (metric) weigh(tensor, begin, size, spare, left);
        int64_t i = 0;
        for (; i + 4 <= K; i += 4) tiles<4>(left + i * BLOCK, right, padded, out + i * M, M, same ? i : 0);
        for (; i < K; ++i) tiles<1>(left + i * BLOCK, right, padded, out + i * M, M, same ? i : 0);
    }

    COMMUTE_INLINE void subtract(int64_t tensor, int64_t begin, int64_t size, double* spare, double* left) const {
        const double factor = 0.5 / eps;
        for (int64_t k = 0; k < K; ++k) {
            read(K + M + metric + k, tensor, begin, size, spare);
            double* row = left + k * BLOCK;
#pragma omp simd
            for (int64_t e = 0; e < size; ++e) row[e] = (row[e] - spare[e]) * factor;
        }
    }

    COMMUTE_INLINE void weigh(int64_t tensor, int64_t begin, int64_t size, double* spare, double* left) const {
        read(K + M, tensor, begin, size, spare);
        for (int64_t k = 0; k < K; ++k) {
            double* row = left + k * BLOCK;
#pragma omp simd
            for (int64_t e = 0; e < size; ++e) row[e] *= spare[e];
        }
    }
};

}  // namespace

void gram_cpu(const int64_t* addresses, const int32_t* dtypes, const int64_t* sizes, int64_t tensors, int64_t K,
              int64_t M, int metric, double eps, int same, double* out, int threads) {
    int64_t elements = 0;
    for (int64_t tensor = 0; tensor < tensors; ++tensor) elements += sizes[tensor];
    const int64_t pieces = pieces_of(elements);
    std::vector<double> sums(static_cast<size_t>(pieces * K * M));
    const Tables tables{addresses, dtypes, sizes, tensors, K, M, metric != 0, same != 0, eps};
    run(Gram{tables, elements, sums.data()}, pieces, threads);
    for (int64_t i = 0; i < K; ++i) {
        for (int64_t j = 0; j < M; ++j) {
            const int64_t from = same && j < i ? j * M + i : i * M + j;
            double total = 0;
            for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece * K * M + from];
            out[i * M + j] = total;
        }
    }
}

}  // namespace commute
