// Hashes of delivered samples: the finaliser of splitmix64 over a sum of odd multiples. The plain reference, which gives
// the same numbers, is sample_hashes in megatron_commute/record/tally.py.
#pragma once

#include <cstdint>

namespace commute {

inline uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

// Sum of factors[i] * tokens[i] mod 2^64; four sums at a time, so that no product waits for the one before.
inline uint64_t content(const int64_t* tokens, const uint64_t* factors, int64_t n) {
    uint64_t sums[4] = {0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        for (int64_t l = 0; l < 4; ++l) sums[l] += factors[i + l] * static_cast<uint64_t>(tokens[i + l]);
    }
    for (; i < n; ++i) sums[0] += factors[i] * static_cast<uint64_t>(tokens[i]);
    return sums[0] + sums[1] + sums[2] + sums[3];
}

inline uint64_t sample_hash(const int64_t (&place)[3], const int64_t* tokens, const uint64_t* factors, int64_t n) {
    return mixed(mixed(content(tokens, factors, n)) + content(place, factors, 3));
}

}  // namespace commute
