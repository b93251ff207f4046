// Runs CUDA kernel bodies on the CPU, one fiber per CUDA thread. Include before the kernels; g++, C++17, x86-64.
//
// Covered: thread and block indices, static and dynamic shared memory, __syncthreads and its votes, __syncwarp,
// shuffles and warp votes with masks, atomics, fences. Blocks run one after the other and the threads of a block
// interleave at these calls, in random, ascending or descending order. Errors of the executor itself: divergent
// barriers, deadlocks, lanes outside their mask. Built with AddressSanitizer, UBSan or ThreadSanitizer, the fibers are
// known to the sanitizer: accesses out of bounds and misaligned ones in global and shared memory, and races between
// threads or blocks. Not covered: tensor cores, asynchronous copies, clusters, cooperative launches, inline PTX, the
// compiler, speed.
#pragma once

#if !defined(__x86_64__)
#error "the executor switches stacks in x86-64 assembly: run its tests on such a machine"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "headers/cuda_bf16.h"
#include "headers/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Shared arrays lie in a section of their own: it is filled with NaN before every block.
#define __shared__ static __attribute__((section("simt_shared")))
#define COMMUTE_SHARED(type, name) type* name = reinterpret_cast<type*>(simt::dynamic_shared())
// Where a kernel calls: in reports, and to tell one barrier from another.
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {

struct Error : std::runtime_error {
    using runtime_error::runtime_error;
};

enum Order { RANDOM, ASCENDING, DESCENDING };
enum Call : uint8_t { NONE, SYNCTHREADS, SYNCWARP, SHUFFLE, VOTE };
enum Vote { PLAIN, COUNT, AND, OR };

// How to run: unordered blocks let ThreadSanitizer see races between them, at about a millisecond a thread.
struct Config {
    Order order = RANDOM;
    uint64_t seed = 0;
    bool unordered_blocks = false;
};

// What a kernel may ask about its thread; index is its number within the block.
struct Thread {
    uint3 thread, block;
    dim3 threads, blocks;
    unsigned index;
};

const Thread* self();
void* dynamic_shared();
void fence();
int barrier(Vote vote, int predicate, const char* file, int line);
uint64_t warp_call(Call call, unsigned mask, uint64_t value, int source, const char* file, int line);

// Runs `body` as every thread of grid x block threads with `bytes` of dynamic shared memory; throws Error.
void run(const Config& config, dim3 grid, dim3 block, size_t bytes, std::function<void()> body);

template <class Kernel, class... A>
void launch(const Config& config, Kernel kernel, dim3 grid, dim3 block, size_t bytes, A... arguments) {
    run(config, grid, block, bytes, [=] { kernel(arguments...); });
}

inline int lane() { return static_cast<int>(self()->index & 31u); }

template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 and 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = warp_call(SHUFFLE, mask, bits, source, file, line);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Keeps template deduction to the pointer, as CUDA's overloads do.
template <class T>
struct Same {
    using type = T;
};

// Relaxed, as CUDA's atomics are: they do not order other memory.
template <class T, class Change>
T atomic(T* at, Change change) {
    T old, fresh;
    __atomic_load(at, &old, __ATOMIC_RELAXED);
    do fresh = change(old);
    while (!__atomic_compare_exchange(at, &old, &fresh, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

}  // namespace simt

#define threadIdx (simt::self()->thread)
#define blockIdx (simt::self()->block)
#define blockDim (simt::self()->threads)
#define gridDim (simt::self()->blocks)
#define warpSize 32

inline void __syncthreads(SIMT_HERE) { simt::barrier(simt::PLAIN, 0, file, line); }
inline int __syncthreads_count(int p, SIMT_HERE) { return simt::barrier(simt::COUNT, p, file, line); }
inline int __syncthreads_and(int p, SIMT_HERE) { return simt::barrier(simt::AND, p, file, line); }
inline int __syncthreads_or(int p, SIMT_HERE) { return simt::barrier(simt::OR, p, file, line); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) { simt::warp_call(simt::SYNCWARP, mask, 0, 0, file, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
    return simt::shuffle(mask, value, (simt::lane() & ~(width - 1)) | (source & (width - 1)), file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32, SIMT_HERE) {
    const int lane = simt::lane(), to = (lane & (width - 1)) + static_cast<int>(step);
    return simt::shuffle(mask, value, to < width ? lane + static_cast<int>(step) : lane, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32, SIMT_HERE) {
    const int lane = simt::lane(), back = static_cast<int>(step);
    return simt::shuffle(mask, value, (lane & (width - 1)) >= back ? lane - back : lane, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_HERE) {
    const int lane = simt::lane(), to = lane ^ bits;
    return simt::shuffle(mask, value, to <= (lane | (width - 1)) ? to : lane, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int p, SIMT_HERE) {
    return static_cast<unsigned>(simt::warp_call(simt::VOTE, mask, p != 0, 0, file, line));
}
inline int __any_sync(unsigned mask, int p, SIMT_HERE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(unsigned mask, int p, SIMT_HERE) { return __ballot_sync(mask, p == 0, file, line) == 0; }

template <class T>
T atomicAdd(T* at, typename simt::Same<T>::type x) {
    return simt::atomic(at, [x](T old) { return static_cast<T>(old + x); });
}
template <class T>
T atomicMax(T* at, typename simt::Same<T>::type x) {
    return simt::atomic(at, [x](T old) { return std::max(old, x); });
}
template <class T>
T atomicExch(T* at, typename simt::Same<T>::type x) {
    return simt::atomic(at, [x](T) { return x; });
}
template <class T>
T atomicCAS(T* at, typename simt::Same<T>::type expected, typename simt::Same<T>::type x) {
    return simt::atomic(at, [=](T old) { return old == expected ? x : old; });
}
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }

template <class T>
T __ldg(const T* at) {
    return *at;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
using std::max;
using std::min;
