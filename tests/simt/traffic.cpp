// What the kernels read and write in global memory: they are compiled with -fsanitize=thread, whose calls before every
// access land here instead of in ThreadSanitizer. For each kernel: bytes asked for, different bytes touched, and the
// count on paper, where every operand is read or written once. Exit status 1 where the touched bytes are not that
// count.
#include <cstdlib>
#include <memory>

#include "cases.h"
//
#include "activation.cuh"
#include "attention_backward.cuh"
#include "cross_entropy.cuh"
#include "gram.cuh"
#include "norm.cuh"
#include "traffic.h"

namespace {

using namespace commute;
using cases::Buffer;

int failures = 0;

// Tensors of one launch, all of them told to the counter.
template <class T>
struct Tensors {
    std::vector<std::unique_ptr<Buffer<T>>> all;

    Tensors() = default;
    Tensors(const Tensors&) = delete;
    ~Tensors() { traffic::forget(); }  // others may be given this memory

    T* operator()(int64_t n) {
        all.push_back(std::make_unique<Buffer<T>>(n));
        all.back()->fill(all.size());
        traffic::watch(all.back()->data, n * sizeof(T));
        return all.back()->data;
    }
};

template <class Launch>
void measure(const char* name, int64_t paper, double passes, const Launch& launch) {
    traffic::start();
    launch();
    const traffic::Count found = traffic::stop();
    const bool good = found.touched == paper && found.asked <= passes * static_cast<double>(paper);
    failures += !good;
    printf("%s %s asked %lld touched %lld paper %lld\n", good ? "ok  " : "FAIL", name, (long long)found.asked,
           (long long)found.touched, (long long)paper);
}

template <class T>
void elementwise() {
    const int64_t n = 4, h = 512, e = sizeof(T);
    const dim3 threads(DUAL_THREADS);
    {
        Tensors<T> t;
        Tensors<float> f;
        const NormForward<T> x = {t(n * h), t(n * h), t(h), t(h), t(h),  t(h), t(n * h),
                                  t(n * h), f(4 * n), n,    h,    1e-5f, true, true};
        measure("norm_forward_kernel", 4 * n * h * e + 4 * h * e + 16 * n, 3.0,
                [&] { simt::launch({}, norm_forward_kernel<T>, dim3(2), threads, 8 * DUAL_WARPS, x); });
        const NormBackward<T> b = {t(n * h), t(n * h),     x.x, x.dx, x.saved, x.weight, x.dweight, t(n * h),
                                   t(n * h), f(2 * 4 * h), n,   h,    2,       true,     true,      true};
        measure("norm_backward_kernel", 6 * n * h * e + 2 * h * e + 16 * n + 32 * h, 2.2,
                [&] { simt::launch({}, norm_backward_kernel<T>, dim3(2), threads, 16 * DUAL_WARPS + 16 * h, b); });
    }
    {
        Tensors<T> t;
        const DualActivations<T> x = {
            nullptr, nullptr, t(2 * n * h), t(2 * n * h), nullptr, nullptr, t(n * h), t(n * h), nullptr, n, h,
            2,       1,       true};
        measure("activation_forward_kernel", 6 * n * h * e, 1.0,
                [&] { simt::launch({}, activation_forward_kernel<T, DUAL_SWIGLU>, dim3(2), threads, 0, x); });
        const DualActivations<T> b = {t(n * h),     t(n * h), x.x, x.dx, nullptr, nullptr, t(2 * n * h),
                                      t(2 * n * h), nullptr,  n,   h,    2,       1,       true};
        measure("activation_backward_kernel", 10 * n * h * e, 1.0,
                [&] { simt::launch({}, activation_backward_kernel<T, DUAL_SWIGLU>, dim3(2), threads, 0, b); });
    }
    {
        Tensors<T> t;
        Tensors<float> f;
        Buffer<int64_t> labels(n);
        for (int64_t i = 0; i < n; ++i) labels[i] = 0;
        traffic::watch(labels.data, n * sizeof(int64_t));
        const DualCrossEntropy<T> x = {t(n * h), t(n * h), labels, f(5 * n), t(n * h), t(n * h), n, h, 0, 1.0f, true};
        measure("cross_entropy_statistics_kernel", 2 * n * h * e + 28 * n, 1.02,
                [&] { simt::launch({}, cross_entropy_statistics_kernel<T>, dim3(2), threads, 8 * DUAL_WARPS, x); });
        // Every thread reads three statistics and the label of its token: the first cache serves all but one of them.
        measure("cross_entropy_backward_kernel", 4 * n * h * e + 20 * n, 2.5,
                [&] { simt::launch({}, cross_entropy_backward_kernel<T>, dim3(2), threads, 0, x); });
    }
}

void gram() {
    const int K = 8, M = 8;
    const int64_t n = 2048;
    Tensors<float> t;
    Tensors<double> d;
    Gram x = {};
    for (int row = 0; row < K + M; ++row) x.rows[row] = t(n);
    x.size = n, x.K = K, x.M = M, x.sums = d(4 * K * M);
    measure("gram_kernel", (K + M) * n * 4 + 4 * K * M * 8, 1.05,
            [&] { simt::launch({}, gram_kernel, dim3(4), dim3(DUAL_THREADS), 32 * DUAL_THREADS, x); });
}

template <class T, int C>
void attention() {
    const int64_t s = 64, size = s * C, e = sizeof(T), tiles = s / ATTENTION_TILE;
    const dim3 grid(static_cast<unsigned>(tiles)), threads(ATTENTION_THREADS);
    Tensors<T> t;
    Tensors<float> f;
    const AttentionForward<T> x = {t(size),  t(size), t(size), t(size), t(size), t(size), t(size), t(size),
                                   f(2 * s), 1,       1,       s,       C,       0.1f,    true};
    measure("attention_forward_kernel", 8 * size * e + 8 * s,
            1.3,  // keys and values once for each tile of queries below them
            [&] { simt::launch({}, attention_forward_kernel<T, C>, grid, threads, 4 * attention_floats(C, 6, 2), x); });
    const AttentionBackward<T> b = {t(size), t(size),  x.q,     x.dq,    x.k,     x.dk,    x.v,     x.dv,
                                    x.saved, f(2 * s), t(size), t(size), t(size), t(size), t(size), t(size),
                                    1,       1,        s,       C,       0.1f,    true};
    measure("attention_queries_kernel", 10 * size * e + 16 * s, 1.3,
            [&] { simt::launch({}, attention_queries_kernel<T, C>, grid, threads, 4 * attention_floats(C, 8, 2), b); });
    measure("attention_keys_kernel", 12 * size * e + 16 * s, 1.3,
            [&] { simt::launch({}, attention_keys_kernel<T, C>, grid, threads, 4 * attention_floats(C, 8, 4), b); });
}

}  // namespace

int main() {
    elementwise<float>(), elementwise<__nv_bfloat16>();
    gram();
    attention<float, 32>(), attention<__nv_bfloat16, 64>();
    return failures ? 1 : 0;
}
