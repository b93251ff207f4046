// Runs a body, an object whose operator()(int64_t piece) is COMMUTE_INLINE, for every piece of a piece of work: compiled
// for each kind of machine, chosen when it runs, spread over threads. Pieces must not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

#if defined(COMMUTE_STD_THREAD)
#include <thread>
#endif

#if defined(__GNUC__)
#define COMMUTE_INLINE __attribute__((always_inline)) inline
#else
#define COMMUTE_INLINE inline
#endif
#if defined(__GNUC__) && defined(__x86_64__) && !defined(COMMUTE_ONE_MACHINE)
#define COMMUTE_MACHINES 1
#endif

namespace commute {

struct bf16 {
    uint16_t bits;
};

COMMUTE_INLINE float widen(float value) { return value; }
COMMUTE_INLINE double widen(double value) { return value; }
COMMUTE_INLINE float widen(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

COMMUTE_INLINE void narrow(float value, float* to) { *to = value; }
COMMUTE_INLINE void narrow(double value, double* to) { *to = value; }
COMMUTE_INLINE void narrow(float value, bf16* to) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// The type of sums over T.
template <class T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};
template <class T>
using wide = typename Wide<T>::type;

// The newest kind of machine to compile for at run time: 0 portable, 1 AVX2, 2 AVX-512. Tests lower it.
inline int newest_machine = 2;

template <class Body>
void run_portable(const Body& body, int64_t piece) {
    body(piece);
}

#if defined(COMMUTE_MACHINES)
template <class Body>
__attribute__((target("avx2,fma"))) void run_avx2(const Body& body, int64_t piece) {
    body(piece);
}
template <class Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(const Body& body,
                                                                                       int64_t piece) {
    body(piece);
}
#endif

template <class Body>
using Run = void (*)(const Body&, int64_t);

template <class Body>
Run<Body> for_this_machine() {
#if defined(COMMUTE_MACHINES)
    if (newest_machine > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return run_avx512<Body>;
    }
    if (newest_machine > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return run_avx2<Body>;
    }
#endif
    return run_portable<Body>;
}

template <class Body>
void run(const Body& body, int64_t pieces, int threads) {
    const Run<Body> function = for_this_machine<Body>();
    const int workers = static_cast<int>(std::min<int64_t>(threads, pieces));
    if (workers <= 1) {  // also in a forked process, where OpenMP may not start threads
        for (int64_t piece = 0; piece < pieces; ++piece) function(body, piece);
        return;
    }
#if defined(COMMUTE_STD_THREAD)
    std::vector<std::thread> team;
    for (int worker = 0; worker < workers; ++worker) {
        team.emplace_back([&, worker] {
            for (int64_t piece = worker; piece < pieces; piece += workers) function(body, piece);
        });
    }
    for (std::thread& thread : team) thread.join();
#else
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers)
    for (int64_t piece = 0; piece < pieces; ++piece) function(body, piece);
#endif
}

// Calls function(T{}) for the element type T of a dtype.
template <class Function>
void with_dtype(int dtype, const Function& function) {
    if (dtype == FLOAT32) return function(float{});
    if (dtype == BFLOAT16) return function(bf16{});
    function(double{});
}

// Rows whose sums by column one piece takes: at most 64 pieces, so that their sums stay small beside the rows.
inline int64_t rows_of_sums(int64_t n) { return std::max<int64_t>(16, (n + 63) / 64); }

// to[k][j] = sum over pieces of sums[piece, k, j], j < width, for every k < count whose to[k] is not null.
template <class F>
void add_pieces(const F* sums, int64_t pieces, int64_t width, int64_t count, void* const* to) {
    std::vector<double> total(static_cast<size_t>(width));
    for (int64_t k = 0; k < count; ++k) {
        if (to[k] == nullptr) continue;
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const F* from = sums + (piece * count + k) * width;
            for (int64_t j = 0; j < width; ++j) total[j] += from[j];
        }
        std::copy(total.begin(), total.end(), static_cast<F*>(to[k]));
    }
}

}  // namespace commute
