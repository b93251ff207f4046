// Inner products of many vectors: the kernels of csrc/gram.cuh against sums in double.
#pragma once

#include <memory>

#include "cases.h"
//
#include "gram.cuh"

namespace cases {

// K rows of X, M of Y, every third row in bf16, of tensors with these sizes; `shift` elements off 16 bytes.
inline void gram(int K, int M, const std::vector<int64_t>& sizes, bool metric, double eps, int64_t shift) {
    using namespace commute;
    const int rows = K + M + metric + (eps > 0.0 ? K : 0), lines = (K + 1) / 2 * 2 + (M + 1) / 2 * 2, blocks = 3;
    const dim3 threads(DUAL_THREADS);
    Buffer<double> sums(static_cast<int64_t>(blocks) * K * M), out(K * M);
    std::vector<double> truth(K * M);
    simt::launch(config, gram_clear_kernel, dim3(2), threads, 0, sums.data, sums.size);
    for (size_t t = 0; t < sizes.size(); ++t) {
        const int64_t n = sizes[t];
        Gram x = {};
        x.size = n, x.sums = sums, x.K = K, x.M = M, x.metric = metric;
        x.factor = eps > 0.0 ? static_cast<float>(0.5 / eps) : 0.0f;
        std::vector<std::unique_ptr<Buffer<float>>> floats(rows);
        std::vector<std::unique_ptr<Buffer<__nv_bfloat16>>> halves(rows);
        std::vector<std::vector<double>> values(rows);
        for (int row = 0; row < rows; ++row) {
            const uint64_t seed = 1000 * t + row + 1;
            x.bf16[row] = row % 3 == 2;
            if (x.bf16[row]) {
                halves[row] = std::make_unique<Buffer<__nv_bfloat16>>(n, shift);
                halves[row]->fill(seed), values[row] = halves[row]->values(), x.rows[row] = halves[row]->data;
            } else {
                floats[row] = std::make_unique<Buffer<float>>(n, shift);
                floats[row]->fill(seed), values[row] = floats[row]->values(), x.rows[row] = floats[row]->data;
            }
        }
        size_t bytes = lines * GRAM_STRIDE * sizeof(float);
        bytes = bytes < 32 * DUAL_THREADS ? 32 * DUAL_THREADS : bytes;
        simt::launch(config, gram_kernel, dim3(blocks), threads, bytes, x);
        for (int k = 0; k < K; ++k) {
            for (int m = 0; m < M; ++m) {
                for (int64_t i = 0; i < n; ++i) {
                    double left = values[k][i];
                    if (eps > 0.0) left = (left - values[K + M + metric + k][i]) * x.factor;
                    truth[k * M + m] += left * (metric ? values[K + M][i] : 1.0) * values[K + m][i];
                }
            }
        }
    }
    simt::launch(config, gram_sums_kernel, dim3(1), threads, 0, (const double*)sums.data, out.data, blocks, K * M);
    compare("gram", out.values(), truth, 2e-6);
}

inline void grams() {
    gram(1, 1, {1}, false, 0.0, 0), gram(1, 1, {777, 3}, true, 0.5, 1);
    gram(8, 8, {500, 1, 64}, false, 0.0, 0), gram(5, 3, {131}, true, 0.25, 0), gram(3, 8, {67, 200}, false, 0.125, 3);
    gram(64, 33, {70}, false, 0.0, 0);
}
// For blocks without order between them.
inline void gram_blocks() { gram(2, 3, {200}, true, 0.0, 0); }

}  // namespace cases
