// The scheduler of simt.h: fibers, barriers and warp calls. Never compiled with -fsanitize itself; -DSIMT_ASAN or
// -DSIMT_TSAN say which sanitizer the kernels use, so that it is told of every switch of stacks.
#include "simt.h"

#include <sys/mman.h>

#include <numeric>
#include <random>
#include <vector>

#ifdef SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_java_alloc(unsigned long at,
                                  unsigned long size);  // forgets what happened to a stretch of memory
#define TSAN(...) __VA_ARGS__
#else
#define TSAN(...)
#endif

extern char __start_simt_shared[] __attribute__((weak));
extern char __stop_simt_shared[] __attribute__((weak));

// Pushes the callee-saved registers, keeps the stack pointer in *from, continues on the stack `to`.
extern "C" void simt_switch(void** from, void* to);
asm(".text\n.type simt_switch,@function\nsimt_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nretq\n"
    ".size simt_switch,.-simt_switch\n");

namespace simt {
namespace {

// FORGOTTEN: how much of a stack is forgotten between unordered blocks; a deeper frame would be reported as a race.
constexpr size_t STACK = 128 << 10, FORGOTTEN = 32 << 10, GUARD = 4096, MOST_SHARED = 227 << 10;
constexpr unsigned MOST_THREADS = 1024, LANES = 32;

enum State : uint8_t { READY, BLOCKED, DONE };

// The call a fiber waits in.
struct Site {
    Call call = NONE;
    const char* file = "";
    int line = 0;
    unsigned mask = 0;

    bool same_place(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

struct Fiber : Thread {
    void* pointer = nullptr;  // its stack pointer while it does not run
    char* stack = nullptr;
    State state = DONE;
    bool fresh = true;
    Site site;
    uint64_t given = 0, result = 0;
    int source = 0;
    void* tsan = nullptr;
};

std::vector<Fiber> fibers;  // those of one block, used again by the next
std::vector<unsigned> ready;
std::vector<void*> retired;  // fibers of ThreadSanitizer's that have ended
Fiber* current = nullptr;
void *scheduler_pointer, *dynamic;
unsigned count, living, arrived;
std::function<void()> body;
std::string fault;
// Addresses that stand for an order of memory. Barriers take two in turn: a quick thread may reach the next barrier
// before a slow one has left this.
TSAN(void* scheduler_tsan; char barrier_token[2], block_token, fence_token, warp_token[LANES][2];
     unsigned barriers, warp_calls[LANES];)
ASAN(const void* scheduler_stack; size_t scheduler_size;)

void to_scheduler([[maybe_unused]] bool last) {
    Fiber* const me = current;
    ASAN(void* fake = nullptr; __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack, scheduler_size);)
    TSAN(__tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);)
    simt_switch(&me->pointer, scheduler_pointer);
    ASAN(__sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);)
}

void block() {
    current->state = BLOCKED;
    to_scheduler(false);
}

void wake(Fiber& fiber) {
    fiber.state = READY;
    ready.push_back(fiber.index);
}

[[noreturn]] void fail(const std::string& message) {
    if (fault.empty()) fault = message;
    for (;;) block();
}

void entry() {
    ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);)
    body();
    current->state = DONE;
    current->site = Site{};
    --living;
    TSAN(__tsan_release(&block_token);)
    to_scheduler(true);
    abort();
}

std::string where(const Fiber& fiber) {
    static const char* const names[] = {"nothing", "__syncthreads", "__syncwarp", "a shuffle", "a vote"};
    const auto place = [](uint3 at) {
        return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
    };
    std::string text =
        "block " + place(fiber.block) + " thread " + place(fiber.thread) + " in " + names[fiber.site.call];
    text += std::string(" at ") + fiber.site.file + ":" + std::to_string(fiber.site.line);
    return fiber.site.mask ? text + " with mask " + std::to_string(fiber.site.mask) : text;
}

// Nobody can go on: two fibers that wait in different places tell why.
std::string deadlock() {
    std::string text =
        "deadlock: " + std::to_string(count - living) + " of " + std::to_string(count) + " threads have ended";
    const Fiber* first = nullptr;
    for (unsigned i = 0; i < count; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state != BLOCKED) continue;
        if (first && fiber.site.same_place(first->site) && fiber.site.mask == first->site.mask) continue;
        text += "; " + where(fiber);
        if (first) break;
        first = &fiber;
    }
    return text;
}

void resume(Fiber& fiber) {
    current = &fiber;
    ASAN(void* fake = nullptr; __sanitizer_start_switch_fiber(&fake, fiber.stack, STACK);)
    TSAN(__tsan_switch_to_fiber(fiber.tsan, fiber.fresh ? 0 : __tsan_switch_to_fiber_no_sync);)
    fiber.fresh = false;
    simt_switch(&scheduler_pointer, fiber.pointer);
    ASAN(const void* stack; size_t size; __sanitizer_finish_switch_fiber(fake, &stack, &size);)
}

// ThreadSanitizer forgets who used this memory: the next block has its own on a GPU.
void forget([[maybe_unused]] char* at, [[maybe_unused]] size_t size) {
    TSAN(if (size) __tsan_java_alloc(reinterpret_cast<unsigned long>(at), size);)
}

// Unused shared memory is NaN, or -1.
void poison(char* at, size_t size, bool unordered) {
    for (volatile char* p = at; p < at + size; ++p) *p = static_cast<char>(0xff);
    if (unordered) forget(at, size);
}

// Making a fiber of ThreadSanitizer's costs most of a millisecond, so ordered blocks share them. Unordered blocks take
// fresh ones, ordered after nothing but the launch; the old live until its end, or a new one might take their place.
void retire_fibers() {
    TSAN(for (Fiber& fiber : fibers) {
        if (fiber.tsan) retired.push_back(fiber.tsan), fiber.tsan = nullptr;
        forget(fiber.stack + STACK - FORGOTTEN, FORGOTTEN);
    })
}

void end_retired() { TSAN(for (void* fiber : retired) __tsan_destroy_fiber(fiber); retired.clear();) }

void check(dim3 grid, dim3 block, size_t bytes) {
    const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
    if (threads == 0 || threads > MOST_THREADS || block.z > 64)
        throw Error("a block has 1 to 1024 threads, 64 along z");
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        throw Error("a grid has 1 to 2^31 - 1 blocks along x and 65535 along y and z");
    }
    if (bytes > MOST_SHARED) throw Error("no GPU has so much shared memory");
}

void grow(size_t threads) {
    while (fibers.size() < threads) {
        void* const memory =
            mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE)) throw std::bad_alloc();
        fibers.emplace_back();
        fibers.back().stack = static_cast<char*>(memory) + GUARD;
    }
}

void prepare(Fiber& fiber, unsigned i, unsigned b, dim3 grid, dim3 block) {
    fiber.index = i, fiber.threads = block, fiber.blocks = grid;
    fiber.block = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    fiber.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    fiber.state = READY, fiber.fresh = true, fiber.site = Site{};
    void** top = reinterpret_cast<void**>(fiber.stack + STACK);
    *--top = nullptr;  // entry has no caller
    *--top = reinterpret_cast<void*>(&entry);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    fiber.pointer = top;
    TSAN(if (!fiber.tsan) fiber.tsan = __tsan_create_fiber(0);)
}

template <class Random>
void arrange(std::vector<unsigned>& list, Order order, Random& random) {
    if (order == RANDOM) return std::shuffle(list.begin(), list.end(), random);
    std::sort(list.begin(), list.end());
    if (order == DESCENDING) std::reverse(list.begin(), list.end());
}

template <class Random>
void run_block(Order order, Random& random) {
    std::vector<unsigned> turn;
    turn.reserve(MOST_THREADS);
    while (living && fault.empty()) {
        if (ready.empty()) {
            fault = deadlock();
            return;
        }
        turn.swap(ready), ready.clear();
        arrange(turn, order, random);
        for (const unsigned i : turn) {
            if (fault.empty()) resume(fibers[i]);
        }
    }
}

}  // namespace

const Thread* self() { return current; }
void* dynamic_shared() { return dynamic; }
void fence() { TSAN(__tsan_acquire(&fence_token); __tsan_release(&fence_token);) }

int barrier(Vote vote, int predicate, const char* file, int line) {
    Fiber* const me = current;
    me->site = {SYNCTHREADS, file, line, 0};
    me->given = predicate != 0;
    TSAN(char* const token = &barrier_token[barriers & 1]; __tsan_release(token);)
    if (++arrived < count) {
        block();
    } else {
        arrived = 0;
        TSAN(++barriers;)
        uint64_t votes = 0;
        for (unsigned i = 0; i < count; ++i) {
            votes += fibers[i].given;
            if (!fibers[i].site.same_place(me->site))
                fail("divergent barrier: " + where(fibers[i]) + " and " + where(*me));
        }
        for (unsigned i = 0; i < count; ++i) fibers[i].result = votes, wake(fibers[i]);
        to_scheduler(false);  // the last to arrive, too, starts again in the chosen order
    }
    TSAN(__tsan_acquire(token);)
    me->site = Site{};
    const auto votes = static_cast<int>(me->result);
    return vote == COUNT ? votes : vote == AND ? votes == static_cast<int>(count) : votes != 0;
}

// Every lane of the mask has come: results for all.
static void complete(Fiber* warp, const Fiber* me, Call call, unsigned mask) {
    uint64_t ballot = 0;
    for (unsigned i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        ballot |= (warp[i].given & 1) << i;
        if (call != SHUFFLE) continue;
        const int source = warp[i].source;
        if (!(mask >> source & 1))
            fail("a shuffle reads lane " + std::to_string(source) + " outside its mask: " + where(warp[i]));
        warp[i].result = warp[source].given;
    }
    for (unsigned i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        if (call == VOTE) warp[i].result = ballot;
        warp[i].site = Site{};
        if (&warp[i] != me) wake(warp[i]);
    }
}

uint64_t warp_call(Call call, unsigned mask, uint64_t value, int source, const char* file, int line) {
    Fiber* const me = current;
    const unsigned first = me->index / LANES * LANES, lanes = std::min(LANES, count - first);
    Fiber* const warp = &fibers[first];
    if (lanes < LANES && mask == ~0u) mask = (1u << lanes) - 1;  // a last warp that is not full
    me->site = {call, file, line, mask};
    me->given = value, me->source = source;
    if (!(mask >> (me->index % LANES) & 1)) fail("a lane is outside its own mask: " + where(*me));
    TSAN(char* const token = &warp_token[first / LANES][warp_calls[first / LANES] & 1];
         if (call == SYNCWARP) __tsan_release(token);)
    bool all = true;
    for (unsigned i = 0; i < LANES && all; ++i) {
        if (!(mask >> i & 1)) continue;
        const Site* const site = i < lanes ? &warp[i].site : nullptr;
        all = site && site->call == call && site->mask == mask && site->same_place(me->site);
    }
    if (all) {
        TSAN(warp_calls[first / LANES] += call == SYNCWARP;)
        complete(warp, me, call, mask);
    } else {
        block();
    }
    TSAN(if (call == SYNCWARP) __tsan_acquire(token);)  // shuffles and votes do not order memory
    return me->result;
}

void run(const Config& config, dim3 grid, dim3 block, size_t bytes, std::function<void()> kernel) {
    check(grid, block, bytes);
    count = block.x * block.y * block.z;
    body = std::move(kernel);
    fault.clear();
    grow(count);
    if (bytes && posix_memalign(&dynamic, 128, bytes)) throw std::bad_alloc();
    std::mt19937_64 random(config.seed);
    std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    arrange(order, config.order, random);
    ready.reserve(MOST_THREADS);
    TSAN(scheduler_tsan = __tsan_get_current_fiber();)
    if (config.unordered_blocks) retire_fibers();
    for (const unsigned b : order) {
        arrived = 0, living = count, ready.clear();
        if (__start_simt_shared) {
            poison(__start_simt_shared, __stop_simt_shared - __start_simt_shared, config.unordered_blocks);
        }
        poison(static_cast<char*>(dynamic), bytes, config.unordered_blocks);
        for (unsigned i = 0; i < count; ++i) prepare(fibers[i], i, b, grid, block), ready.push_back(i);
        run_block(config.order, random);
        if (config.unordered_blocks) {
            retire_fibers();
        } else {
            TSAN(__tsan_acquire(&block_token);)
        }
        if (!fault.empty()) break;
    }
    TSAN(__tsan_acquire(&block_token);)
    end_retired();
    if (bytes) free(dynamic), dynamic = nullptr;
    if (!fault.empty()) {
        fibers.clear();  // the stacks of threads that have not ended stay allocated
        throw Error(fault);
    }
}

}  // namespace simt
