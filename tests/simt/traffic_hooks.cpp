// The functions that code compiled with -fsanitize=thread calls before its accesses. Compiled without it.
#include <cstddef>
#include <vector>

#include "traffic.h"

namespace traffic {
namespace {

struct Region {
    uintptr_t begin, end;
    std::vector<bool> touched;
};

// Never destroyed: instrumented code runs until the very end.
std::vector<Region>& regions() {
    static auto* const all = new std::vector<Region>;
    return *all;
}
bool counting = false;
int64_t asked = 0;

void touch(const void* at, size_t bytes) {
    if (!counting) return;
    const auto address = reinterpret_cast<uintptr_t>(at);
    for (Region& region : regions()) {
        if (address < region.begin || address >= region.end) continue;
        asked += bytes;
        for (size_t i = 0; i < bytes; ++i) region.touched[address - region.begin + i] = true;
        return;
    }
}

}  // namespace

void watch(const void* memory, int64_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    regions().push_back({begin, begin + bytes, std::vector<bool>(bytes)});
}

void forget() { regions().clear(); }

void start() {
    for (Region& region : regions()) region.touched.assign(region.touched.size(), false);
    asked = 0;
    counting = true;
}

Count stop() {
    counting = false;
    int64_t touched = 0;
    for (const Region& region : regions()) {
        for (const bool bit : region.touched) touched += bit;
    }
    return {asked, touched};
}

}  // namespace traffic

#define ACCESS(size)                                                         \
    void __tsan_read##size(void* at) { traffic::touch(at, size); }           \
    void __tsan_write##size(void* at) { traffic::touch(at, size); }          \
    void __tsan_unaligned_read##size(void* at) { traffic::touch(at, size); } \
    void __tsan_unaligned_write##size(void* at) { traffic::touch(at, size); }
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* at, size_t size) { traffic::touch(at, size); }
void __tsan_write_range(void* at, size_t size) { traffic::touch(at, size); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
char __tsan_atomic8_load(const volatile char* at, int) { return *at; }
int __tsan_atomic32_load(const volatile int* at, int) { return *at; }
}
