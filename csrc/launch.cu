// Launchers of the CUDA kernels behind plain C names, for ctypes: the dtype's code (0 float32, 1 bfloat16), pointers as
// in kernels.h, memory to work in, sizes and numbers as int64 and double, the stream. They return a cudaError_t. With
// COMMUTE_SIMT the same file is compiled for the executor of tests/simt, which runs every launch on the CPU.
#if defined(COMMUTE_SIMT)
#include "simt.h"
using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
#define COMMUTE_LAUNCH(kernel, blocks, bytes, stream, ...) \
    (simt::launch(simt::Config{}, kernel, dim3(blocks), dim3(commute::DUAL_THREADS), bytes, __VA_ARGS__), (void)stream, 0)
#else
#include "attention_launch.cuh"
#define COMMUTE_LAUNCH(kernel, blocks, bytes, stream, ...)                                          \
    (kernel<<<static_cast<unsigned>(blocks), commute::DUAL_THREADS, bytes, stream>>>(__VA_ARGS__), \
     cudaGetLastError())
#endif

#include "activation.cuh"
#include "cross_entropy.cuh"
#include "gram.cuh"
#include "norm.cuh"

namespace commute {
namespace {

constexpr int64_t COLUMN_PIECES = 64, MOST_BLOCKS = 1 << 20, WARP_FLOATS = DUAL_WARPS * sizeof(float);
constexpr int64_t MOST_SHARED = 96 << 10;  // bytes a block may use where two of them shall fit on a multiprocessor

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t pieces(int64_t n, int64_t most) { return (n + most - 1) / most; }
int64_t blocks_of(int64_t n) { return least(n, MOST_BLOCKS); }

template <class T, class... P>
bool aligned(int64_t width, const P*... pointers) {
    return width * sizeof(T) % 16 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T>
const T* in(const void* p) {
    return static_cast<const T*>(p);
}
template <class T>
T* out(void* p) {
    return static_cast<T*>(p);
}

cudaError_t add_columns(const float* sums, int64_t count, int64_t width, int64_t number, float* const* to,
                        cudaStream_t stream) {
    ColumnSums x = {sums, {nullptr, nullptr, nullptr, nullptr}, number, width, count};
    for (int64_t k = 0; k < count; ++k) x.to[k] = to[k];
    return COMMUTE_LAUNCH(dual_columns_kernel, blocks_of(pieces(count * width, DUAL_THREADS)), 0, stream, x);
}

template <class T>
cudaError_t norm_backward_with(NormBackward<T> x, float* const* to, cudaStream_t stream) {
    x.rows = pieces(x.n, COLUMN_PIECES);
    const int64_t blocks = pieces(x.n, x.rows), sums = 4 * x.h * sizeof(float);
    x.shared = sums + 4 * WARP_FLOATS <= MOST_SHARED;
    const int bytes = static_cast<int>(4 * WARP_FLOATS + (x.shared ? sums : 0));
#if !defined(COMMUTE_SIMT)
    const cudaError_t allowed =
        cudaFuncSetAttribute(norm_backward_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (allowed != cudaSuccess) return allowed;
#endif
    const cudaError_t status = COMMUTE_LAUNCH(norm_backward_kernel<T>, blocks, bytes, stream, x);
    return status != cudaSuccess ? status : add_columns(x.sums, 4, x.h, blocks, to, stream);
}

template <class T>
cudaError_t activation_with(DualActivations<T> x, int64_t kind, cudaStream_t stream) {
    x.chunks = pieces(x.f, DUAL_THREADS * Pack<T>::SIZE);
    // few rows a block where nothing is added up, at most COLUMN_PIECES blocks of rows where something is
    x.rows = x.gy != nullptr && x.sums != nullptr ? pieces(x.n, COLUMN_PIECES) : pieces(x.n * x.chunks, MOST_BLOCKS);
    const int64_t blocks = pieces(x.n, x.rows) * x.chunks;
    if (x.gy == nullptr) {
        if (kind == DUAL_GELU_TANH) {
            return COMMUTE_LAUNCH((activation_forward_kernel<T, DUAL_GELU_TANH>), blocks, 0, stream, x);
        }
        if (kind == DUAL_GELU_ERF) {
            return COMMUTE_LAUNCH((activation_forward_kernel<T, DUAL_GELU_ERF>), blocks, 0, stream, x);
        }
        return COMMUTE_LAUNCH((activation_forward_kernel<T, DUAL_SWIGLU>), blocks, 0, stream, x);
    }
    if (kind == DUAL_GELU_TANH) return COMMUTE_LAUNCH((activation_backward_kernel<T, DUAL_GELU_TANH>), blocks, 0, stream, x);
    if (kind == DUAL_GELU_ERF) return COMMUTE_LAUNCH((activation_backward_kernel<T, DUAL_GELU_ERF>), blocks, 0, stream, x);
    return COMMUTE_LAUNCH((activation_backward_kernel<T, DUAL_SWIGLU>), blocks, 0, stream, x);
}

// Calls function(T{}) for the element type T of a dtype.
template <class Function>
int with(int64_t dtype, const Function& function) {
    if (dtype == 0) return static_cast<int>(function(float{}));
    if (dtype == 1) return static_cast<int>(function(__nv_bfloat16{}));
    return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace
}  // namespace commute

using namespace commute;

extern "C" {

int norm_forward(int64_t dtype, const void* x, const void* dx, const void* weight, const void* dweight,
                 const void* bias, const void* dbias, void* y, void* dy, void* saved, void*, int64_t n, int64_t h,
                 double eps, int64_t kind, cudaStream_t stream) {
    return with(dtype, [&](auto type) {
        using T = decltype(type);
        const bool wide = aligned<T>(h, x, dx, weight, dweight, bias, dbias, y, dy);
        const NormForward<T> k = {in<T>(x), in<T>(dx), in<T>(weight), in<T>(dweight), in<T>(bias), in<T>(dbias),
                                  out<T>(y), out<T>(dy), out<float>(saved), n, h, static_cast<float>(eps), kind == 0,
                                  wide};
        return COMMUTE_LAUNCH(norm_forward_kernel<T>, blocks_of(n), 2 * WARP_FLOATS, stream, k);
    });
}

int norm_backward(int64_t dtype, const void* gy, const void* dgy, const void* x, const void* dx, const void* saved,
                  const void* weight, const void* dweight, void* gx, void* dgx, void* gweight, void* dgweight,
                  void* gbias, void* dgbias, void* scratch, int64_t n, int64_t h, int64_t kind, cudaStream_t stream) {
    float* const to[] = {out<float>(gweight), out<float>(dgweight), out<float>(gbias), out<float>(dgbias)};
    return with(dtype, [&](auto type) {
        using T = decltype(type);
        const bool wide = aligned<T>(h, gy, dgy, x, dx, weight, dweight, gx, dgx);
        const NormBackward<T> k = {in<T>(gy), in<T>(dgy), in<T>(x), in<T>(dx), in<float>(saved), in<T>(weight),
                                   in<T>(dweight), out<T>(gx), out<T>(dgx), out<float>(scratch), n, h, 0, kind == 0,
                                   wide, false};
        return norm_backward_with(k, to, stream);
    });
}

int activation_forward(int64_t dtype, const void* x, const void* dx, const void* bias, const void* dbias, void* y,
                       void* dy, void*, int64_t n, int64_t f, int64_t kind, cudaStream_t stream) {
    return with(dtype, [&](auto type) {
        using T = decltype(type);
        const bool wide = aligned<T>(f, x, dx, bias, dbias, y, dy);
        const DualActivations<T> k = {nullptr, nullptr, in<T>(x), in<T>(dx), in<T>(bias), in<T>(dbias), out<T>(y),
                                      out<T>(dy), nullptr, n, f, 0, 0, wide};
        return activation_with(k, kind, stream);
    });
}

int activation_backward(int64_t dtype, const void* gy, const void* dgy, const void* x, const void* dx,
                        const void* bias, const void* dbias, void* gx, void* dgx, void* gbias, void* dgbias,
                        void* scratch, int64_t n, int64_t f, int64_t kind, cudaStream_t stream) {
    float* const to[] = {out<float>(gbias), out<float>(dgbias)};
    float* const sums = bias == nullptr ? nullptr : out<float>(scratch);
    return with(dtype, [&](auto type) {
        using T = decltype(type);
        const bool wide = aligned<T>(f, gy, dgy, x, dx, bias, dbias, gx, dgx);
        const DualActivations<T> k = {in<T>(gy), in<T>(dgy), in<T>(x), in<T>(dx), in<T>(bias), in<T>(dbias),
                                      out<T>(gx), out<T>(dgx), sums, n, f, 0, 0, wide};
        const auto status = activation_with(k, kind, stream);
        if (status != cudaSuccess || sums == nullptr) return status;
        const int64_t number = pieces(n, pieces(n, COLUMN_PIECES));
        return add_columns(sums, 2, kind == DUAL_SWIGLU ? 2 * f : f, number, to, stream);
    });
}

int cross_entropy_statistics(int64_t dtype, const void* logits, const void* dlogits, const void* labels,
                             void* statistics, void*, int64_t n, int64_t v, int64_t first, cudaStream_t stream) {
    return with(dtype, [&](auto type) {
        using T = decltype(type);
        const DualCrossEntropy<T> k = {in<T>(logits), in<T>(dlogits), in<int64_t>(labels), out<float>(statistics),
                                       nullptr, nullptr, n, v, first, 0.0f, aligned<T>(v, logits, dlogits)};
        return COMMUTE_LAUNCH(cross_entropy_statistics_kernel<T>, blocks_of(n), 2 * WARP_FLOATS, stream, k);
    });
}

int cross_entropy_backward(int64_t dtype, const void* logits, const void* dlogits, const void* labels,
                           const void* statistics, void* glogits, void* dglogits, void*, int64_t n, int64_t v,
                           int64_t first, double scale, cudaStream_t stream) {
    return with(dtype, [&](auto type) {
        using T = decltype(type);
        const bool wide = aligned<T>(v, logits, dlogits, glogits, dglogits);
        const DualCrossEntropy<T> k = {in<T>(logits), in<T>(dlogits), in<int64_t>(labels),
                                       const_cast<float*>(in<float>(statistics)), out<T>(glogits), out<T>(dglogits),
                                       n, v, first, static_cast<float>(scale), wide};
        return COMMUTE_LAUNCH(cross_entropy_backward_kernel<T>, blocks_of(n), 0, stream, k);
    });
}

// Tables as in gram_cpu, on the host; to [K, M] and scratch, GRAM_BLOCKS K M doubles, on the device.
int gram(const int64_t* addresses, const int32_t* dtypes, const int64_t* sizes, int64_t tensors, int64_t K, int64_t M,
         int64_t metric, double eps, double* to, double* scratch, cudaStream_t stream) {
    if (K > GRAM_MOST || M > GRAM_MOST) return static_cast<int>(cudaErrorInvalidValue);
    const int64_t rows = K + M + metric + (eps != 0.0 ? K : 0), count = K * M, lines = (K + 1) / 2 * 2 + (M + 1) / 2 * 2;
    int64_t bytes = lines * GRAM_STRIDE * sizeof(float);
    bytes = bytes < 32 * DUAL_THREADS ? 32 * DUAL_THREADS : bytes;
    auto status = COMMUTE_LAUNCH(gram_clear_kernel, 64, 0, stream, scratch, GRAM_BLOCKS * count);
    for (int64_t tensor = 0; tensor < tensors && status == cudaSuccess; ++tensor) {
        if (sizes[tensor] == 0) continue;
        Gram x = {};
        for (int64_t row = 0; row < rows; ++row) {
            x.rows[row] = reinterpret_cast<const void*>(addresses[row * tensors + tensor]);
            x.bf16[row] = dtypes[row * tensors + tensor] == 1;
        }
        x.size = sizes[tensor], x.sums = scratch, x.K = static_cast<int>(K), x.M = static_cast<int>(M);
        x.metric = metric != 0, x.factor = eps != 0.0 ? static_cast<float>(0.5 / eps) : 0.0f;
        const int64_t blocks = least(GRAM_BLOCKS, pieces(x.size, GRAM_CHUNK));
        status = COMMUTE_LAUNCH(gram_kernel, blocks, static_cast<int>(bytes), stream, x);
    }
    if (status != cudaSuccess) return static_cast<int>(status);
    status = COMMUTE_LAUNCH(gram_sums_kernel, 16, 0, stream, scratch, to, GRAM_BLOCKS, static_cast<int>(count));
    return static_cast<int>(status);
}

#if !defined(COMMUTE_SIMT)
int attention_forward(int64_t dtype, const void* q, const void* dq, const void* k, const void* dk, const void* v,
                      const void* dv, void* o, void* d_o, void* saved, void*, int64_t b, int64_t a, int64_t g, int64_t s,
                      int64_t c, double scale, cudaStream_t stream) {
    return with(dtype, [&](auto type) {
        using T = decltype(type);
        return attention_forward_cuda<T>(in<T>(q), in<T>(dq), in<T>(k), in<T>(dk), in<T>(v), in<T>(dv), out<T>(o),
                                         out<T>(d_o), out<float>(saved), b, a, g, s, c, scale, stream);
    });
}

int attention_backward(int64_t dtype, const void* go, const void* dgo, const void* q, const void* dq, const void* k,
                       const void* dk, const void* v, const void* dv, const void* o, const void* d_o,
                       const void* saved, void* gq, void* dgq, void* gk, void* dgk, void* gv, void* dgv, void* scratch,
                       int64_t b, int64_t a, int64_t g, int64_t s, int64_t c, double scale, cudaStream_t stream) {
    return with(dtype, [&](auto type) {
        using T = decltype(type);
        return attention_backward_cuda<T>(in<T>(go), in<T>(dgo), in<T>(q), in<T>(dq), in<T>(k), in<T>(dk), in<T>(v),
                                          in<T>(dv), in<T>(o), in<T>(d_o), in<float>(saved), out<float>(scratch),
                                          out<T>(gq), out<T>(dgq), out<T>(gk), out<T>(dgk), out<T>(gv), out<T>(dgv), b,
                                          a, g, s, c, scale, stream);
    });
}
#endif

}  // extern "C"
