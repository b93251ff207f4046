// LayerNorm and RMSNorm of value and tangent. With c = x - mean, r = 1 / sqrt(mean(c^2) + eps), m = mean(c dc):
// y = c r w + b and dy = (dc r + c dr) w + c r dw + db, where dc = dx - dmean and dr = -r^3 m.
#include "vectorise.h"

namespace commute {
namespace {

int64_t rows_of(int64_t n, int64_t h) { return std::max<int64_t>(1, std::min<int64_t>(n, (1 << 14) / (h + 1))); }

template <class T>
struct Forward {
    using F = wide<T>;
    const T *x, *dx, *weight, *dweight, *bias, *dbias;
    T *y, *dy;
    F* saved;
    int64_t n, h, rows;
    F eps;
    bool layer;

    COMMUTE_INLINE void operator()(int64_t piece) const {
        const int64_t end = std::min(n, (piece + 1) * rows);
        for (int64_t i = piece * rows; i < end; ++i) row(x + i * h, dx + i * h, y + i * h, dy + i * h, saved + 4 * i);
    }

    COMMUTE_INLINE void row(const T* u, const T* du, T* v, T* dv, F* keep) const {
        F mean = 0, dmean = 0, square = 0, cross = 0;
        if (layer) {
#pragma omp simd reduction(+ : mean, dmean)
            for (int64_t j = 0; j < h; ++j) mean += widen(u[j]), dmean += widen(du[j]);
            mean /= F(h), dmean /= F(h);
        }
#pragma omp simd reduction(+ : square, cross)
        for (int64_t j = 0; j < h; ++j) {
            const F c = widen(u[j]) - mean, dc = widen(du[j]) - dmean;
            square += c * c, cross += c * dc;
        }
        const F r = F(1) / std::sqrt(square / F(h) + eps), dr = -r * r * r * (cross / F(h));
        keep[0] = mean, keep[1] = r, keep[2] = dmean, keep[3] = dr;
        if (bias == nullptr) {
#pragma omp simd
            for (int64_t j = 0; j < h; ++j) element(u, du, v, dv, j, mean, r, dmean, dr, F(0), F(0));
        } else {
#pragma omp simd
            for (int64_t j = 0; j < h; ++j) {
                element(u, du, v, dv, j, mean, r, dmean, dr, widen(bias[j]), widen(dbias[j]));
            }
        }
    }

    COMMUTE_INLINE void element(const T* u, const T* du, T* v, T* dv, int64_t j, F mean, F r, F dmean, F dr, F b,
                                F db) const {
        const F c = widen(u[j]) - mean, dc = widen(du[j]) - dmean, w = widen(weight[j]), dw = widen(dweight[j]);
        narrow(c * r * w + b, v + j);
        narrow((dc * r + c * dr) * w + c * r * dw + db, dv + j);
    }
};

// With z = c r, dz = dc r + c dr, g = gy w, dg = dgy w + gy dw, means a = mean(g) (0 for RMS) and e = mean(g z):
// t = g - a - z e, gx = t r, and by the product rule dgx = dt r + t dr.
template <class T>
struct Backward {
    using F = wide<T>;
    const T *gy, *dgy, *x, *dx;
    const F* saved;
    const T *weight, *dweight;
    T *gx, *dgx;
    F* sums;  // [pieces, 4, h]: gweight, dgweight, gbias, dgbias of the piece's rows
    int64_t n, h, rows;
    bool layer;

    COMMUTE_INLINE void operator()(int64_t piece) const {
        const int64_t end = std::min(n, (piece + 1) * rows);
        F* sum = sums + piece * 4 * h;
        std::fill(sum, sum + 4 * h, F(0));
        for (int64_t i = piece * rows; i < end; ++i) row(i, sum, sum + h, sum + 2 * h, sum + 3 * h);
    }

    COMMUTE_INLINE void row(int64_t i, F* gw, F* dgw, F* gb, F* dgb) const {
        const T *u = x + i * h, *du = dx + i * h, *s = gy + i * h, *ds = dgy + i * h;
        T *v = gx + i * h, *dv = dgx + i * h;
        const F mean = saved[4 * i], r = saved[4 * i + 1], dmean = saved[4 * i + 2], dr = saved[4 * i + 3];
        F a = 0, da = 0, e = 0, de = 0;
#pragma omp simd reduction(+ : a, da, e, de)
        for (int64_t j = 0; j < h; ++j) {
            const F c = widen(u[j]) - mean, dc = widen(du[j]) - dmean, z = c * r, dz = dc * r + c * dr;
            const F o = widen(s[j]), d_o = widen(ds[j]), w = widen(weight[j]), dw = widen(dweight[j]);
            const F g = o * w, dg = d_o * w + o * dw;
            a += g, da += dg, e += g * z, de += dg * z + g * dz;
        }
        a = layer ? a / F(h) : F(0), da = layer ? da / F(h) : F(0), e /= F(h), de /= F(h);
#pragma omp simd
        for (int64_t j = 0; j < h; ++j) {
            const F c = widen(u[j]) - mean, dc = widen(du[j]) - dmean, z = c * r, dz = dc * r + c * dr;
            const F o = widen(s[j]), d_o = widen(ds[j]), w = widen(weight[j]), dw = widen(dweight[j]);
            const F t = o * w - a - z * e, dt = d_o * w + o * dw - da - dz * e - z * de;
            narrow(t * r, v + j);
            narrow(dt * r + t * dr, dv + j);
            gw[j] += o * z, dgw[j] += d_o * z + o * dz, gb[j] += o, dgb[j] += d_o;
        }
    }
};

template <class T>
void forward(const void* x, const void* dx, const void* weight, const void* dweight, const void* bias,
             const void* dbias, void* y, void* dy, void* saved, int64_t n, int64_t h, double eps, int kind,
             int threads) {
    using F = wide<T>;
    const auto at = [](const void* p) { return static_cast<const T*>(p); };
    const int64_t rows = rows_of(n, h);
    const Forward<T> body{at(x), at(dx), at(weight), at(dweight), at(bias), at(dbias), static_cast<T*>(y),
                          static_cast<T*>(dy), static_cast<F*>(saved), n, h, rows, static_cast<F>(eps), kind == LAYER};
    run(body, (n + rows - 1) / rows, threads);
}

template <class T>
void backward(const void* gy, const void* dgy, const void* x, const void* dx, const void* saved, const void* weight,
              const void* dweight, void* gx, void* dgx, void* const* sums, int64_t n, int64_t h, int kind,
              int threads) {
    using F = wide<T>;
    const auto at = [](const void* p) { return static_cast<const T*>(p); };
    const int64_t rows = rows_of_sums(n), pieces = (n + rows - 1) / rows;
    std::vector<F> scratch(static_cast<size_t>(pieces * 4 * h));
    const Backward<T> body{at(gy), at(dgy), at(x), at(dx), static_cast<const F*>(saved), at(weight), at(dweight),
                           static_cast<T*>(gx), static_cast<T*>(dgx), scratch.data(), n, h, rows, kind == LAYER};
    run(body, pieces, threads);
    add_pieces(scratch.data(), pieces, h, 4, sums);
}

}  // namespace

void norm_forward_cpu(int dtype, const void* x, const void* dx, const void* weight, const void* dweight,
                      const void* bias, const void* dbias, void* y, void* dy, void* saved, int64_t n, int64_t h,
                      double eps, int kind, int threads) {
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        forward<T>(x, dx, weight, dweight, bias, dbias, y, dy, saved, n, h, eps, kind, threads);
    });
}

void norm_backward_cpu(int dtype, const void* gy, const void* dgy, const void* x, const void* dx, const void* saved,
                       const void* weight, const void* dweight, void* gx, void* dgx, void* gweight, void* dgweight,
                       void* gbias, void* dgbias, int64_t n, int64_t h, int kind, int threads) {
    void* const sums[] = {gweight, dgweight, gbias, dgbias};
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        backward<T>(gy, dgy, x, dx, saved, weight, dweight, gx, dgx, sums, n, h, kind, threads);
    });
}

}  // namespace commute
