// What the cases of all kernels share: exact-size buffers with random numbers, and the comparison with a reference in
// double.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "simt.h"

namespace cases {

inline simt::Config config;  // order and seed of every launch, from the command line
inline int failures = 0;

inline double wide(float x) { return x; }
inline double wide(double x) { return x; }
inline double wide(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
T narrow(double x) {
    return static_cast<T>(static_cast<float>(x));
}
template <>
inline double narrow<double>(double x) {
    return x;
}

// n elements that begin `shift` elements after a multiple of 16 bytes; memory ends with the last of them, so that a
// sanitizer sees the next byte.
template <class T>
struct Buffer {
    char* memory;
    T* data;
    int64_t size;

    explicit Buffer(int64_t n, int64_t shift = 0) : size(n) {
        void* at = nullptr;
        if (posix_memalign(&at, 64, (n + shift) * sizeof(T))) abort();
        memory = static_cast<char*>(at);
        data = reinterpret_cast<T*>(memory) + shift;
        std::memset(memory, 0xff, (n + shift) * sizeof(T));  // a result that is not written is NaN
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(memory); }
    operator T*() { return data; }
    std::vector<double> values() const {
        std::vector<double> found(size);
        for (int64_t i = 0; i < size; ++i) found[i] = wide(data[i]);
        return found;
    }
    void fill(uint64_t seed, double scale = 1.0) {
        std::mt19937_64 random(seed);
        std::normal_distribution<double> normal(0.0, scale);
        for (int64_t i = 0; i < size; ++i) data[i] = narrow<T>(normal(random));
    }
};

// Largest error over the largest magnitude of the reference; NaN counts as a failure.
inline void compare(const char* name, const std::vector<double>& found, const std::vector<double>& truth,
                    double bound) {
    double error = 0.0, size = 1e-30;
    bool finite = found.size() == truth.size();
    for (size_t i = 0; i < truth.size() && finite; ++i) {
        finite = std::isfinite(found[i]);
        error = std::max(error, std::abs(found[i] - truth[i]));
        size = std::max(size, std::abs(truth[i]));
    }
    const bool good = finite && error <= bound * size;
    failures += !good;
    printf("%s %s error %.2e bound %.2e\n", good ? "ok  " : "FAIL", name, finite ? error / size : NAN, bound);
}

}  // namespace cases
