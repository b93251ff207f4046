// The counter behind traffic.cpp: which bytes of watched memory the kernels touch, and how often they ask for them.
#pragma once

#include <cstdint>

namespace traffic {

struct Count {
    int64_t asked, touched;
};

void watch(const void* memory, int64_t bytes);
void forget();
void start();
Count stop();

}  // namespace traffic
