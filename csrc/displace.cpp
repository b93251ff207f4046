// Displaced copies: moved = params + eps D v, rounded to the dtype of params, and what rounding left of the step.
#include "vectorise.h"

namespace commute {
namespace {

constexpr int64_t PIECE = 1 << 15;

template <class T, class V, class D>
struct Displace {
    using F = wide<T>;
    const T* params;
    const V* v;
    const D* metric;
    T* moved;
    F* realised;
    int64_t size;
    F eps;

    COMMUTE_INLINE void operator()(int64_t piece) const {
        const int64_t begin = piece * PIECE, end = std::min(size, begin + PIECE);
#pragma omp simd
        for (int64_t e = begin; e < end; ++e) {
            const F step = F(widen(v[e])) * (metric == nullptr ? F(1) : F(widen(metric[e])));
            narrow(widen(params[e]) + eps * step, moved + e);
        }
        if (realised == nullptr) return;
#pragma omp simd
        for (int64_t e = begin; e < end; ++e) realised[e] = widen(moved[e]) - widen(params[e]);
    }
};

}  // namespace

void displace_cpu(int dtype, int dtype_v, int dtype_metric, const void* params, const void* v, const void* metric,
                  void* moved, void* realised, int64_t size, double eps, int threads) {
    with_dtype(dtype, [&](auto a) {
        with_dtype(dtype_v, [&](auto b) {
            with_dtype(dtype_metric, [&](auto c) {
                using T = decltype(a);
                using V = decltype(b);
                using D = decltype(c);
                using F = wide<T>;
                const Displace<T, V, D> body{static_cast<const T*>(params), static_cast<const V*>(v),
                                             static_cast<const D*>(metric), static_cast<T*>(moved),
                                             static_cast<F*>(realised), size, static_cast<F>(eps)};
                run(body, size / PIECE + (size % PIECE != 0), threads);
            });
        });
    });
}

}  // namespace commute
