// exp, logistic and error function as plain arithmetic, so that loops over floats become vector code. Errors are below
// 3e-7 relative, NaN stays NaN, nothing overflows. double goes to the C++ library.
#pragma once

#include "vectorise.h"

namespace commute {

// e^x for x <= 0; 0 below the smallest normal number. Polynomial of the Cephes library on [-ln 2 / 2, ln 2 / 2].
COMMUTE_INLINE float exp_negative(float x) {
    const float bounded = x < -87.3f ? -87.3f : x;
    const float shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 2^23: its low bits are the rounded power of two
    const float power = shifted - 12582912.0f;
    const float r = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127u) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return x < -87.3f ? 0.0f : p * scale;
}
COMMUTE_INLINE double exp_negative(double x) { return std::exp(x); }

COMMUTE_INLINE float absolute(float x) { return std::fabs(x); }
COMMUTE_INLINE double absolute(double x) { return std::fabs(x); }

// s = 1 / (1 + e^-z) and 1 - s, both to full relative precision.
template <class F>
COMMUTE_INLINE void logistic(F z, F* s, F* rest) {
    const F e = exp_negative(-absolute(z));
    const F large = F(1) / (F(1) + e), small = e * large;
    *s = z < F(0) ? small : large;
    *rest = z < F(0) ? large : small;
}

// Cumulative distribution P(x) and density D(x) of the standard normal. erfc(u) = t Q(t) e^(-u u), t = 2 / (2 + u),
// Q a Chebyshev fit of degree 9 on 0 <= u <= 9.5.
COMMUTE_INLINE void normal(float x, float* P, float* D) {
    const float u = absolute(x) * 0.70710678f, e = exp_negative(-0.5f * x * x);
    const float t = 2.0f / (2.0f + u), r = (t - 0.58695652f) * 2.42105263f;
    float q = 6.5784924496e-06f;
    q = q * r - 4.9147660440e-05f;
    q = q * r + 1.5244033599e-07f;
    q = q * r + 5.5550577326e-04f;
    q = q * r - 5.6344836701e-04f;
    q = q * r - 5.9645620121e-03f;
    q = q * r + 5.5996609523e-03f;
    q = q * r + 1.0041272450e-01f;
    q = q * r + 3.2514610799e-01f;
    q = q * r + 5.7485642095e-01f;
    const float tail = 0.5f * t * q * e;
    *P = x < 0.0f ? tail : 1.0f - tail;
    *D = 0.39894228f * e;
}
COMMUTE_INLINE void normal(double x, double* P, double* D) {
    *P = 0.5 * std::erfc(-x * 0.70710678118654752440);
    *D = 0.39894228040143267794 * std::exp(-0.5 * x * x);
}

}  // namespace commute
