// CPU kernels on dual numbers: every tensor x comes with its tangent dx along one direction, forward and backward of
// both in one pass. What each computes is said in megatron_commute/kernels/reference.py, which has the same arguments.
// Pointers are to contiguous tensors in row-major order, never null unless a comment says so; sizes and indices are
// 64 bits wide; sums are taken in float (double for float64 tensors). `saved` and statistics have the type of the sums.
// `threads` never changes a result: work is cut into pieces that depend on the sizes alone.
#pragma once

#include <cstdint>

namespace commute {

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT64 = 2 };
enum Norm : int { LAYER = 0, RMS = 1 };
enum Activation : int { GELU_TANH = 0, GELU_ERF = 1, SWIGLU = 2 };

// x [n, h], weight [h], bias [h] or null -> y [n, h], saved [n, 4]: mean, 1 / deviation and their tangents.
void norm_forward_cpu(int dtype, const void* x, const void* dx, const void* weight, const void* dweight,
                      const void* bias, const void* dbias, void* y, void* dy, void* saved, int64_t n, int64_t h,
                      double eps, int kind, int threads);
// -> gx [n, h] and, in the type of the sums, gweight, dgweight [h]; gbias, dgbias [h] may be null.
void norm_backward_cpu(int dtype, const void* gy, const void* dgy, const void* x, const void* dx, const void* saved,
                       const void* weight, const void* dweight, void* gx, void* dgx, void* gweight, void* dgweight,
                       void* gbias, void* dgbias, int64_t n, int64_t h, int kind, int threads);

// x [n, f] (swiglu: [n, 2f], the gate first), bias as wide as x or null -> y [n, f].
void activation_forward_cpu(int dtype, const void* x, const void* dx, const void* bias, const void* dbias, void* y,
                            void* dy, int64_t n, int64_t f, int kind, int threads);
// -> gx as x; gbias, dgbias in the type of the sums, null without a bias.
void activation_backward_cpu(int dtype, const void* gy, const void* dgy, const void* x, const void* dx,
                             const void* bias, const void* dbias, void* gx, void* dgx, void* gbias, void* dgbias,
                             int64_t n, int64_t f, int kind, int threads);

// logits [n, v] of the words first .. first + v - 1 -> statistics [n, 5]: maximum, sum of exp(l - maximum), the same
// times dl, the label's logit and its tangent (0 where the label lies in another shard).
void cross_entropy_statistics_cpu(int dtype, const void* logits, const void* dlogits, const int64_t* labels,
                                  void* statistics, int64_t n, int64_t v, int64_t first, int threads);
void cross_entropy_backward_cpu(int dtype, const void* logits, const void* dlogits, const int64_t* labels,
                                const void* statistics, void* glogits, void* dglogits, int64_t n, int64_t v,
                                int64_t first, double scale, int threads);

// Causal attention: q [b, a, s, c]; k, v [b, g, s, c] with a % g == 0; saved [b, a, s, 2]: log-sum-exp, its tangent.
void attention_forward_cpu(int dtype, const void* q, const void* dq, const void* k, const void* dk, const void* v,
                           const void* dv, void* o, void* d_o, void* saved, int64_t b, int64_t a, int64_t g, int64_t s,
                           int64_t c, double scale, int threads);
void attention_backward_cpu(int dtype, const void* go, const void* dgo, const void* q, const void* dq, const void* k,
                            const void* dk, const void* v, const void* dv, const void* o, const void* d_o,
                            const void* saved, void* gq, void* dgq, void* gk, void* dgk, void* gv, void* dgv, int64_t b,
                            int64_t a, int64_t g, int64_t s, int64_t c, double scale, int threads);

// out [K, M] = sum over tensors and elements of X_k D Y_m. The tables hold the addresses and dtypes of T tensors a
// vector: first K rows of X, then M of Y, then one of D if `metric`, then K of `minus` if eps is not 0, when X stands for
// (X - minus) / (2 eps). sizes [T]. X and Y may be the same: give `same`, and half the products are taken.
void gram_cpu(const int64_t* addresses, const int32_t* dtypes, const int64_t* sizes, int64_t tensors, int64_t K,
              int64_t M, int metric, double eps, int same, double* out, int threads);

// moved = params + eps D v in the dtype of params; realised = moved - params in float (double). D and realised may be
// null; dtypes: of params, of v, of D.
void displace_cpu(int dtype, int dtype_v, int dtype_metric, const void* params, const void* v, const void* metric,
                  void* moved, void* realised, int64_t size, double eps, int threads);

// Piece `index` of the elements of all tensors laid end to end: where it begins and ends. There are at most PIECES.
struct Piece {
    int64_t begin, end;
};
constexpr int64_t PIECES = 256, LEAST_PIECE = 1 << 14;
int64_t pieces_of(int64_t elements);
Piece piece_of(int64_t elements, int64_t index);

}  // namespace commute
