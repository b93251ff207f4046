// The bfloat16 of headers/cuda_bf16.h against its definition: round trips, ties to even, NaN, infinity.
#pragma once

#include "cases.h"

namespace cases {

inline void bfloat16() {
    int64_t wrong = 0;
    for (unsigned bits = 0; bits < 0x7f80; ++bits) {  // every positive finite number and the one above it
        const float below = __uint_as_float(bits << 16), above = __uint_as_float((bits + 1) << 16);
        const unsigned middle = (bits << 16) + 0x8000u, even = bits & 1 ? bits + 1 : bits;
        wrong += __float2bfloat16_rn(below).bits != bits || __bfloat162float(__ushort_as_bfloat16(bits)) != below;
        wrong += __float2bfloat16_rn(-above).bits != (0x8000u | (bits + 1));
        wrong += __float2bfloat16_rn(__uint_as_float(middle)).bits != even;
        wrong += __float2bfloat16_rn(__uint_as_float(middle + 1)).bits != bits + 1;
        wrong += __float2bfloat16_rn(__uint_as_float(middle - 1)).bits != bits;
    }
    const float nan = __bfloat162float(__float2bfloat16_rn(NAN));
    wrong += nan == nan;
    compare("bfloat16", {static_cast<double>(wrong)}, {0.0}, 0.0);
}

}  // namespace cases
