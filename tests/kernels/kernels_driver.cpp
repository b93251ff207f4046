// Runs every kernel over odd sizes on buffers that end with their last element, for sanitizers to watch, and compares
// bytes across numbers of threads. Compiled with csrc/*.cpp, or with -DCOMMUTE_SIMT for the CUDA launchers on the
// executor of tests/simt. Exit status 1: results depend on the number of threads.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#if defined(COMMUTE_SIMT)
#include "launch.cu"
#define CALL(name, pointers, rest) check(name(dtype, pointers, scratch.memory, rest, nullptr))
static void check(int status) {
    if (status) abort();
}
#else
#include "kernels.h"
#define CALL(name, pointers, rest) commute::name##_cpu(dtype, pointers, rest, threads)
#endif
#define LIST(...) __VA_ARGS__

namespace {

uint64_t digest;  // of every result
std::mt19937_64 random_bits;

// n numbers of a dtype, `shift` of them after a multiple of 16 bytes, drawn at random or (out) added to the digest.
struct Buffer {
    char *start, *memory;
    size_t bytes;
    bool out;

    Buffer(int dtype, int64_t n, int shift = 0, bool result = false, bool zero = false) : out(result) {
        const size_t size = dtype == 1 ? 2 : dtype == 2 ? 8 : 4;
        bytes = n * size;
        start = static_cast<char*>(std::malloc(bytes + shift * size)), memory = start + shift * size;
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < n && !zero; ++i) {
            const double x = out ? 0.0 : normal(random_bits);
            const float f = static_cast<float>(x);
            uint32_t word;
            std::memcpy(&word, &f, 4);
            const uint16_t half = static_cast<uint16_t>(word >> 16);
            std::memcpy(memory + i * size, dtype == 0 ? (const void*)&f : dtype == 1 ? (const void*)&half : &x, size);
        }
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        for (size_t i = 0; i < bytes && out; ++i) digest = (digest ^ static_cast<unsigned char>(memory[i])) * 1099511628211u;
        std::free(start);
    }
    operator void*() const { return memory; }
};

void norms(int dtype, int64_t n, int64_t h, int kind, int shift, int threads) {
    const int wide = dtype == 2 ? 2 : 0;
    const Buffer x(dtype, n * h, shift), dx(dtype, n * h), w(dtype, h), dw(dtype, h), b(dtype, h), db(dtype, h);
    const Buffer y(dtype, n * h, 0, true), dy(dtype, n * h, 0, true), saved(wide, 4 * n, 0, true);
    const Buffer gx(dtype, n * h, 0, true), dgx(dtype, n * h, 0, true), gw(wide, h, 0, true), dgw(wide, h, 0, true);
    const Buffer gb(wide, h, 0, true), dgb(wide, h, 0, true), scratch(0, 64 * 4 * h, 0, false, true);
    CALL(norm_forward, LIST(x, dx, w, dw, kind ? nullptr : b.memory, kind ? nullptr : db.memory, y, dy, saved),
         LIST(n, h, 1e-5, kind));
    CALL(norm_backward, LIST(x, dx, y, dy, saved, w, dw, gx, dgx, gw, dgw, gb, dgb), LIST(n, h, kind));
    (void)threads;
}

void activations(int dtype, int64_t n, int64_t f, int kind, int shift, int threads) {
    const int wide = dtype == 2 ? 2 : 0;
    const int64_t width = kind == 2 ? 2 * f : f;
    const Buffer x(dtype, n * width, shift), dx(dtype, n * width), b(dtype, width), db(dtype, width);
    const Buffer y(dtype, n * f, 0, true), dy(dtype, n * f, 0, true), gx(dtype, n * width, 0, true);
    const Buffer dgx(dtype, n * width, 0, true), gb(wide, width, 0, true), dgb(wide, width, 0, true);
    const Buffer scratch(0, 64 * 2 * width, 0, false, true);
    for (const bool biased : {true, false}) {
        void *const one = biased ? b.memory : nullptr, *const two = biased ? db.memory : nullptr;
        CALL(activation_forward, LIST(x, dx, one, two, y, dy), LIST(n, f, kind));
        CALL(activation_backward, LIST(y, dy, x, dx, one, two, gx, dgx, gb, dgb), LIST(n, f, kind));
    }
    (void)threads;
}

void cross_entropy(int dtype, int64_t n, int64_t v, int shift, int threads) {
    const Buffer l(dtype, n * v, shift), dl(dtype, n * v), g(dtype, n * v, 0, true), dg(dtype, n * v, 0, true);
    const Buffer statistics(dtype == 2 ? 2 : 0, 5 * n, 0, true), scratch(0, 1);
    std::vector<int64_t> labels(n);
    for (int64_t i = 0; i < n; ++i) labels[i] = i * 5 - 3;
    CALL(cross_entropy_statistics, LIST(l, dl, labels.data(), statistics), LIST(n, v, 2));
    CALL(cross_entropy_backward, LIST(l, dl, labels.data(), statistics, g, dg), LIST(n, v, 2, 0.5));
    (void)threads;
}

void gram(int dtype, const std::vector<int64_t>& sizes, int64_t K, int64_t M, int metric, double eps, int threads) {
    const int64_t rows = K + M + metric + (eps != 0 ? K : 0), tensors = sizes.size();
    std::vector<Buffer*> all;
    std::vector<int64_t> addresses;
    for (int64_t row = 0; row < rows; ++row) {
        for (const int64_t size : sizes) all.push_back(new Buffer(dtype, size, static_cast<int>(row % 3)));
    }
    for (Buffer* one : all) addresses.push_back(reinterpret_cast<int64_t>(one->memory));
    const std::vector<int32_t> dtypes(all.size(), dtype);
    {
        const Buffer to(2, K * M, 0, true);
        double* const sums = reinterpret_cast<double*>(to.memory);
#if defined(COMMUTE_SIMT)
        const Buffer scratch(2, 256 * K * M);
        double* const space = reinterpret_cast<double*>(scratch.memory);
        check(::gram(addresses.data(), dtypes.data(), sizes.data(), tensors, K, M, metric, eps, sums, space, nullptr));
#else
        commute::gram_cpu(addresses.data(), dtypes.data(), sizes.data(), tensors, K, M, metric, eps, 0, sums, threads);
#endif
    }
    for (Buffer* one : all) delete one;
    (void)threads;
}

#if !defined(COMMUTE_SIMT)
void displace(int dtype, int64_t n, int threads) {
    const Buffer p(dtype, n, 1), v(0, n), d(1, n), moved(dtype, n, 0, true), step(dtype == 2 ? 2 : 0, n, 0, true);
    commute::displace_cpu(dtype, 0, 1, p, v, d, moved, step, n, 0.1, threads);
    commute::displace_cpu(dtype, 0, dtype, p, v, nullptr, moved, nullptr, n, 0.1, threads);
}
#endif

void everything(int dtype, int threads) {
    const int64_t sizes[][2] = {{1, 1}, {3, 5}, {67, 33}, {2, 1030}};
    for (const auto& [n, h] : sizes) {
        for (int kind = 0; kind < 2; ++kind) norms(dtype, n, h, kind, static_cast<int>(n % 2), threads);
        for (int kind = 0; kind < 3; ++kind) activations(dtype, n, h, kind, static_cast<int>(n % 2), threads);
        cross_entropy(dtype, n, h, static_cast<int>(n % 2), threads);
    }
    gram(dtype, {67, 0, 1, 300}, 5, 3, 1, 0.25, threads);
    gram(dtype, {33}, 9, 8, 0, 0.0, threads);
#if !defined(COMMUTE_SIMT)
    gram(dtype, {(1 << 20) + 7, 5}, 2, 5, 0, 0.0, threads);
    displace(dtype, 70001, threads);
#endif
}

}  // namespace

int main() {
    for (int dtype = 0; dtype < 3; ++dtype) {
#if defined(COMMUTE_SIMT)
        if (dtype < 2) everything(dtype, 1);
#else
        uint64_t found[2];
        for (int more = 0; more < 2; ++more) {
            digest = 1469598103934665603u, random_bits.seed(0);
            everything(dtype, more ? 3 : 1);
            found[more] = digest;
        }
        if (found[0] != found[1]) return printf("dtype %d: results depend on the number of threads\n", dtype), 1;
#endif
    }
    return 0;
}
