// Softmax cross-entropy of value and tangent over one shard of the vocabulary. With p = exp(l - max) / sum and
// m = sum p dl: glogits = scale (p - 1[label]), dglogits = scale p (dl - m).
#include "elementary.h"

namespace commute {
namespace {

constexpr int64_t BLOCK = 4096;  // words that stay in the first cache between finding their maximum and adding them up

template <class T>
struct Statistics {
    using F = wide<T>;
    const T *logits, *dlogits;
    const int64_t* labels;
    F* statistics;
    int64_t v, first;

    COMMUTE_INLINE void operator()(int64_t i) const {
        const T *l = logits + i * v, *dl = dlogits + i * v;
        F maximum = -std::numeric_limits<F>::infinity();
        double sum = 0, dsum = 0;
        for (int64_t begin = 0; begin < v; begin += BLOCK) {
            const int64_t end = std::min(v, begin + BLOCK);
            F top = maximum;
#pragma omp simd reduction(max : top)
            for (int64_t j = begin; j < end; ++j) top = widen(l[j]) > top ? widen(l[j]) : top;
            if (top == -std::numeric_limits<F>::infinity()) {  // nothing but -inf and NaN so far: NaN must show
                for (int64_t j = begin; j < end; ++j) sum += widen(l[j]) != widen(l[j]) ? widen(l[j]) : F(0);
                continue;
            }
            const double shrink = maximum < top ? std::exp(double(maximum) - double(top)) : 1.0;
            F s = 0, ds = 0;
#pragma omp simd reduction(+ : s, ds)
            for (int64_t j = begin; j < end; ++j) {
                const F e = exp_negative(widen(l[j]) - top);
                s += e, ds += e * widen(dl[j]);
            }
            sum = sum * shrink + s, dsum = dsum * shrink + ds, maximum = top;
        }
        const int64_t label = labels[i] - first;
        const bool here = labels[i] >= first && label < v;
        F* out = statistics + 5 * i;
        out[0] = maximum, out[1] = F(sum), out[2] = F(dsum);
        out[3] = here ? widen(l[label]) : F(0), out[4] = here ? widen(dl[label]) : F(0);
    }
};

template <class T>
struct Backward {
    using F = wide<T>;
    const T *logits, *dlogits;
    const int64_t* labels;
    const F* statistics;
    T *glogits, *dglogits;
    int64_t v, first;
    F scale;

    COMMUTE_INLINE void operator()(int64_t i) const {
        const T *l = logits + i * v, *dl = dlogits + i * v;
        T *g = glogits + i * v, *dg = dglogits + i * v;
        const F *in = statistics + 5 * i, maximum = in[0], factor = scale / in[1], mean = in[2] / in[1];
#pragma omp simd
        for (int64_t j = 0; j < v; ++j) {
            const F p = exp_negative(widen(l[j]) - maximum) * factor;
            narrow(p, g + j);
            narrow(p * (widen(dl[j]) - mean), dg + j);
        }
        const int64_t label = labels[i] - first;
        if (labels[i] < first || label >= v) return;
        narrow(exp_negative(widen(l[label]) - maximum) * factor - scale, g + label);
    }
};

}  // namespace

void cross_entropy_statistics_cpu(int dtype, const void* logits, const void* dlogits, const int64_t* labels,
                                  void* statistics, int64_t n, int64_t v, int64_t first, int threads) {
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const Statistics<T> body{static_cast<const T*>(logits), static_cast<const T*>(dlogits), labels,
                                 static_cast<wide<T>*>(statistics), v, first};
        run(body, n, threads);
    });
}

void cross_entropy_backward_cpu(int dtype, const void* logits, const void* dlogits, const int64_t* labels,
                                const void* statistics, void* glogits, void* dglogits, int64_t n, int64_t v,
                                int64_t first, double scale, int threads) {
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        using F = wide<T>;
        const Backward<T> body{static_cast<const T*>(logits), static_cast<const T*>(dlogits), labels,
                               static_cast<const F*>(statistics), static_cast<T*>(glogits), static_cast<T*>(dglogits),
                               v, first, static_cast<F>(scale)};
        run(body, n, threads);
    });
}

}  // namespace commute
