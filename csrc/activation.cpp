// GELU (tanh and erf) and SwiGLU of value and tangent, the bias added first. With a = x + bias and slopes f', f'' of
// the activation f: y = f, dy = f' da, gx = gy f', dgx = dgy f' + gy f'' da. SwiGLU: y = f(gate) up with f = silu.
#include "elementary.h"

namespace commute {
namespace {

template <class F>
struct Slopes {
    F value, first, second;
};

template <int KIND, class F>
COMMUTE_INLINE Slopes<F> slopes(F x) {
    if constexpr (KIND == GELU_ERF) {
        F P, D;
        normal(x, &P, &D);
        return {x * P, P + x * D, D * (F(2) - x * x)};
    } else {  // x s(z), s the logistic function; z = x for silu, 2 sqrt(2 / pi) (x + 0.044715 x^3) for gelu
        constexpr F k = KIND == GELU_TANH ? F(1.5957691216057307) : F(1), c = KIND == GELU_TANH ? F(0.044715) : F(0);
        const F z = k * x * (F(1) + c * x * x), dz = k * (F(1) + F(3) * c * x * x), ddz = F(6) * k * c * x;
        F s, rest;
        logistic(z, &s, &rest);
        const F ds = s * rest, dds = ds * (rest - s);
        return {x * s, s + x * ds * dz, F(2) * ds * dz + x * (dds * dz * dz + ds * ddz)};
    }
}

template <class T>
struct Tensors {
    using F = wide<T>;
    const T *gy, *dgy, *x, *dx, *bias, *dbias;
    T *out, *dout;
    F* sums;  // [pieces, 2, width of x], or null without a bias
    int64_t n, f, rows;
};

template <class T, int KIND, bool BIAS>
struct Forward : Tensors<T> {
    using F = wide<T>;
    COMMUTE_INLINE void operator()(int64_t piece) const {
        const int64_t f = this->f, width = KIND == SWIGLU ? 2 * f : f;
        const int64_t end = std::min(this->n, (piece + 1) * this->rows);
        const T *b = this->bias, *db = this->dbias;
        for (int64_t i = piece * this->rows; i < end; ++i) {
            const T *x = this->x + i * width, *dx = this->dx + i * width;
            T *y = this->out + i * f, *dy = this->dout + i * f;
#pragma omp simd
            for (int64_t j = 0; j < f; ++j) {
                const F a = widen(x[j]) + (BIAS ? widen(b[j]) : F(0)), da = widen(dx[j]) + (BIAS ? widen(db[j]) : F(0));
                const Slopes<F> s = slopes<KIND>(a);
                if constexpr (KIND == SWIGLU) {
                    const F up = widen(x[j + f]) + (BIAS ? widen(b[j + f]) : F(0));
                    const F dup = widen(dx[j + f]) + (BIAS ? widen(db[j + f]) : F(0));
                    narrow(s.value * up, y + j);
                    narrow(s.first * da * up + s.value * dup, dy + j);
                } else {
                    narrow(s.value, y + j);
                    narrow(s.first * da, dy + j);
                }
            }
        }
    }
};

template <class T, int KIND, bool BIAS>
struct Backward : Tensors<T> {
    using F = wide<T>;
    COMMUTE_INLINE void operator()(int64_t piece) const {
        const int64_t f = this->f, width = KIND == SWIGLU ? 2 * f : f;
        const int64_t end = std::min(this->n, (piece + 1) * this->rows);
        F* sum = BIAS ? this->sums + piece * 2 * width : nullptr;
        if (BIAS) std::fill(sum, sum + 2 * width, F(0));
        for (int64_t i = piece * this->rows; i < end; ++i) {
            const T *x = this->x + i * width, *dx = this->dx + i * width, *g = this->gy + i * f, *dg = this->dgy + i * f;
            T *gx = this->out + i * width, *dgx = this->dout + i * width;
#pragma omp simd
            for (int64_t j = 0; j < f; ++j) element(x, dx, g, dg, gx, dgx, sum, width, j);
        }
    }

    COMMUTE_INLINE void element(const T* x, const T* dx, const T* g, const T* dg, T* gx, T* dgx, F* sum, int64_t width,
                                int64_t j) const {
        const T *b = this->bias, *db = this->dbias;
        const int64_t f = this->f;
        const F a = widen(x[j]) + (BIAS ? widen(b[j]) : F(0)), da = widen(dx[j]) + (BIAS ? widen(db[j]) : F(0));
        const F o = widen(g[j]), d_o = widen(dg[j]);
        const Slopes<F> s = slopes<KIND>(a);
        F ga = o * s.first, dga = d_o * s.first + o * s.second * da;
        if constexpr (KIND == SWIGLU) {
            const F up = widen(x[j + f]) + (BIAS ? widen(b[j + f]) : F(0));
            const F dup = widen(dx[j + f]) + (BIAS ? widen(db[j + f]) : F(0));
            const F gup = o * s.value, dgup = d_o * s.value + o * s.first * da;
            dga = dga * up + ga * dup, ga *= up;
            narrow(gup, gx + j + f);
            narrow(dgup, dgx + j + f);
            if (BIAS) sum[j + f] += gup, sum[width + j + f] += dgup;
        }
        narrow(ga, gx + j);
        narrow(dga, dgx + j);
        if (BIAS) sum[j] += ga, sum[width + j] += dga;
    }
};

template <class T, template <class, int, bool> class Body>
void of_kind(const Tensors<T>& t, int kind, int64_t pieces, int threads) {
    const bool bias = t.bias != nullptr;
    if (kind == GELU_TANH && bias) return run(Body<T, GELU_TANH, true>{t}, pieces, threads);
    if (kind == GELU_TANH) return run(Body<T, GELU_TANH, false>{t}, pieces, threads);
    if (kind == GELU_ERF && bias) return run(Body<T, GELU_ERF, true>{t}, pieces, threads);
    if (kind == GELU_ERF) return run(Body<T, GELU_ERF, false>{t}, pieces, threads);
    if (bias) return run(Body<T, SWIGLU, true>{t}, pieces, threads);
    return run(Body<T, SWIGLU, false>{t}, pieces, threads);
}

}  // namespace

void activation_forward_cpu(int dtype, const void* x, const void* dx, const void* bias, const void* dbias, void* y,
                            void* dy, int64_t n, int64_t f, int kind, int threads) {
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const auto at = [](const void* p) { return static_cast<const T*>(p); };
        const int64_t rows = std::max<int64_t>(1, (1 << 13) / (f + 1));
        const Tensors<T> t{nullptr,   nullptr,          at(x),             at(dx),  at(bias), at(dbias),
                           static_cast<T*>(y), static_cast<T*>(dy), nullptr, n,        f,        rows};
        of_kind<T, Forward>(t, kind, (n + rows - 1) / rows, threads);
    });
}

void activation_backward_cpu(int dtype, const void* gy, const void* dgy, const void* x, const void* dx,
                             const void* bias, const void* dbias, void* gx, void* dgx, void* gbias, void* dgbias,
                             int64_t n, int64_t f, int kind, int threads) {
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const auto at = [](const void* p) { return static_cast<const T*>(p); };
        const int64_t width = kind == SWIGLU ? 2 * f : f, rows = rows_of_sums(n), pieces = (n + rows - 1) / rows;
        std::vector<wide<T>> scratch(bias == nullptr ? 0 : static_cast<size_t>(pieces * 2 * width));
        const Tensors<T> t{at(gy),   at(dgy),          at(x),             at(dx),         at(bias), at(dbias),
                           static_cast<T*>(gx), static_cast<T*>(dgx), scratch.data(), n,        f,        rows};
        of_kind<T, Backward>(t, kind, pieces, threads);
        void* const sums[] = {gbias, dgbias};
        if (bias != nullptr) add_pieces(scratch.data(), pieces, width, 2, sums);
    });
}

}  // namespace commute
