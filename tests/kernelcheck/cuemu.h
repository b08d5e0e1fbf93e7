// Runs the kernels of csrc/cuda on a CPU, so that they can be proved without a GPU: csrc/cuda/portable.cuh includes
// this file when ARMOR_HOST_SHIM is defined. No CUDA toolkit is needed.
//
// Every CUDA thread is a fiber, which runs until it waits for others (a barrier, a warp shuffle) or reaches an atomic
// or a fence; then a seeded schedule says who goes on. What that shows:
// - a missing barrier, as a wrong or NaN result under some schedule, because shared memory starts out as NaN, and with
//   -fsanitize=thread as a data race under any, because only what orders memory on a GPU does so here;
// - barriers and shuffles that threads meet at different places or not at all, a grid barrier without every block being
//   resident, too much shared memory: launch() throws a std::runtime_error that names the thread and the line;
// - accesses out of the bounds of global or shared memory, with -fsanitize=address; misaligned ones and other
//   undefined behaviour, with -fsanitize=undefined.
// What it cannot show: speed and registers; values as nvcc computes them (it contracts a * b + c and has another libm);
// reorderings that a GPU's weak memory model allows and that no data race betrays; code that nvcc rejects.
//
// Launches are one-dimensional and one at a time, warp functions take full masks, and shared memory is static: kernels
// have needed no more so far.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__) && !defined(CUEMU_UCONTEXT)
#define CUEMU_UCONTEXT
#endif
#if defined(CUEMU_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace cuemu {

enum class Order { forward, reverse, random };

struct Schedule {
  Order order = Order::random;
  std::uint64_t seed = 1;
  unsigned resident = ~0u;  // how many blocks run at a time
  bool cooperative = true;  // may all of them meet?
};

// body() is what one thread does: a call of the kernel. Returns when every thread has returned.
inline void launch(const Schedule& schedule, unsigned blocks, unsigned threads, const std::function<void()>& body);

constexpr unsigned kWarp = 32;
constexpr std::size_t kSharedLimit = 48 * 1024;  // static shared memory of a block
constexpr std::size_t kGap = 64;                 // between shared arrays, for -fsanitize=address
constexpr std::size_t kStack = 64 * 1024;
constexpr std::size_t kGuard = 4096;  // unmapped end of every stack

// ---- what the sanitizers must know ---------------------------------------------------------------------------------

// While one lives, -fsanitize=thread looks away: the shim's own state is not part of what is tested.
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unwatched() {}
#endif
};

// On functions that run between fibers, where none can look away.
#define CUEMU_UNWATCHED __attribute__((no_sanitize("thread")))

// Orders memory: what happened before release() happened before everything after acquire().
struct Clock {
  char address = 0;
  void release() {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&address);
#endif
  }
  void acquire() {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&address);
#endif
  }
};

inline void poison([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory, bytes);
#endif
}

inline void unpoison([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

// ---- fibers --------------------------------------------------------------------------------------------------------

// The registers of a fiber that does not run.
#if !defined(CUEMU_UCONTEXT)
struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, std::size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;  // the registers that swap() restores
    stack_pointer = top;
  }
};

// In assembly because swapcontext() enters the operating system, which takes ten times as long.
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) inline void swap_registers(
    [[maybe_unused]] void** from, [[maybe_unused]] void* to) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}

inline void swap(Context& from, Context& to) { swap_registers(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t registers;

  void prepare(char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&registers);
    registers.uc_stack.ss_sp = stack;
    registers.uc_stack.ss_size = bytes;
    registers.uc_link = nullptr;
    makecontext(&registers, entry, 0);
  }
};

inline void swap(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
#endif

using Place = std::source_location;

struct Block;

// One CUDA thread.
struct Fiber {
  Context context;
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  Block* block = nullptr;
  unsigned thread = 0;  // its index in the block
  bool done = false;
  const char* waits_at = nullptr;  // the function, and
  Place place;                     // where it is called
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* watched = nullptr;
#endif
};

// Where all members must be before any of them goes on.
struct Barrier {
  std::span<Fiber> members;
  std::size_t arrived = 0;
  std::uint64_t turn = 0;
  Clock clocks[2];  // by turns, so that who leaves late does not learn what the next turn did
  const char* function = nullptr;
  Place place;
};

struct Warp {
  Barrier barrier;
  std::uint64_t exchanged[2][kWarp];  // by turns, too: a lane may be one shuffle ahead of another
};

struct SharedArray {
  const void* tag;
  void* memory;
};

struct Block {
  unsigned index = 0, alive = 0;
  char* stacks = nullptr;  // of its threads, while it runs
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<std::byte[]> shared;
  std::size_t shared_bytes = 0;
  std::vector<SharedArray> arrays;

  ~Block() { unpoison(shared.get(), kSharedLimit); }
};

// Fibers that could run, in the order in which they came to be so.
class Ring {
 public:
  explicit Ring(std::size_t capacity) : fibers(capacity) {}

  bool empty() const { return count == 0; }
  void push(Fiber* fiber) { fibers[(first + count++) % fibers.size()] = fiber; }
  Fiber* take_last() { return fibers[(first + --count) % fibers.size()]; }
  Fiber* take_first() {
    Fiber* fiber = fibers[first];
    first = (first + 1) % fibers.size();
    --count;
    return fiber;
  }
  Fiber* take_any(std::mt19937_64& random) {
    std::swap(fibers[first], fibers[(first + random() % count) % fibers.size()]);
    return take_first();
  }

 private:
  std::vector<Fiber*> fibers;
  std::size_t first = 0, count = 0;
};

// Who runs next. Forward: who has waited longest. Reverse: who has waited least. Random: any, but one fiber in eight is
// left until no other can run, because most mistakes need somebody to be very late.
class Scheduler {
 public:
  Scheduler(const Schedule& schedule, std::size_t fibers)
      : order(schedule.order), random(schedule.seed), ready(fibers), late(fibers) {}

  bool empty() const { return ready.empty() && late.empty(); }

  void push(Fiber* fiber) { (order == Order::random && random() % 8 == 0 ? late : ready).push(fiber); }

  Fiber* take() {
    if (order == Order::forward) return ready.take_first();
    if (order == Order::reverse) return ready.take_last();
    return ready.empty() ? late.take_first() : ready.take_any(random);
  }

  // In the order in which blocks start, of which the last is the first.
  void arrange(std::vector<Block*>& blocks) {
    if (order == Order::forward) std::reverse(blocks.begin(), blocks.end());
    if (order == Order::random) std::shuffle(blocks.begin(), blocks.end(), random);
  }

 private:
  Order order;
  std::mt19937_64 random;
  Ring ready, late;
};

struct Dimension {
  unsigned x;
};

struct Launch {
  Dimension grid;
  unsigned most_resident, resident = 0;  // blocks
  bool cooperative;
  const std::function<void()>& body;
  Scheduler scheduler;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<char*> free_stacks;  // for a block each
  Barrier all;
  Clock fence, finished;
  Fiber main;
  Fiber* running = &main;
  std::string error;

  Launch(const Schedule& schedule, unsigned blocks_, unsigned threads, const std::function<void()>& body_);
  ~Launch();
  void run();
  void start(Block& block);
};

inline Launch* current = nullptr;

CUEMU_UNWATCHED inline Fiber& self() { return *current->running; }

CUEMU_UNWATCHED inline void switch_to(Fiber& to) {
  Fiber& from = self();
  if (&to == &from) return;
  current->running = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.watched, __tsan_switch_to_fiber_no_sync);
#endif
  swap(from.context, to.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Who runs after one that waits or ends.
inline Fiber& next() {
  Launch& launch = *current;
  return launch.scheduler.empty() ? launch.main : *launch.scheduler.take();
}

// A point at which the schedule may prefer others.
inline void yield() {
  Unwatched unwatched;
  current->scheduler.push(&self());
  switch_to(next());
}

// ---- barriers ------------------------------------------------------------------------------------------------------

inline std::string describe(const char* function, const Place& place) {
  return std::string(function) + " at " + place.file_name() + ":" + std::to_string(place.line()) + " in " +
         place.function_name();
}

inline std::string describe(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " of block " + std::to_string(fiber.block->index);
}

// Ends the launch. The fibers stay where they are, and nothing on their stacks is destroyed: kernels own no memory.
[[noreturn]] inline void fail(std::string&& what) {
  what.insert(0, describe(self()) + ": ");
  current->error.swap(what);
  switch_to(current->main);
  __builtin_unreachable();
}

inline bool same(const Place& one, const Place& other) {
  const auto equal = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
  return one.line() == other.line() && one.column() == other.column() && equal(one.file_name(), other.file_name()) &&
         equal(one.function_name(), other.function_name());
}

inline void meet(Barrier& barrier, const char* function, const Place& place, bool orders_memory) {
  Fiber& me = self();
  Clock& clock = barrier.clocks[barrier.turn % 2];
  if (orders_memory) clock.release();
  if (barrier.arrived == 0) {
    barrier.function = function;
    barrier.place = place;
  } else if (barrier.function != function || !same(barrier.place, place)) {
    std::string what = describe(function, place) + ", while others are at " + describe(barrier.function, barrier.place);
    fail(std::move(what));
  }
  if (++barrier.arrived == barrier.members.size()) {
    barrier.arrived = 0;
    ++barrier.turn;
    for (Fiber& fiber : barrier.members) current->scheduler.push(&fiber);
  }
  me.waits_at = function;
  me.place = place;
  switch_to(next());
  me.waits_at = nullptr;
  if (orders_memory) clock.acquire();
}

inline void* shared_array(const void* tag, std::size_t bytes) {
  Unwatched unwatched;
  Block& block = *self().block;
  for (const SharedArray& array : block.arrays)
    if (array.tag == tag) return array.memory;
  std::byte* memory = block.shared.get() + block.shared_bytes;
  block.shared_bytes += (bytes + kGap - 1) / kGap * kGap + kGap;
  if (block.shared_bytes > kSharedLimit) fail("more than 48 KiB of shared memory");
  unpoison(memory, bytes);
  std::memset(memory, 0xff, bytes);  // NaN
  block.arrays.push_back({tag, memory});
  return memory;
}

// ---- launches ------------------------------------------------------------------------------------------------------

// Ends this fiber. Returns who runs next.
inline Fiber& finish() {
  Unwatched unwatched;
  Launch& launch = *current;
  Fiber& me = self();
  launch.finished.release();
  me.done = true;
  if (--me.block->alive > 0) return next();
  --launch.resident;
  launch.free_stacks.push_back(me.block->stacks);
  return launch.main;  // which may start another block
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  Fiber& main = current->main;
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!main.stack) {  // the first fiber comes from main
    main.stack = stack;
    main.stack_bytes = bytes;
  }
#endif
  current->body();
  switch_to(finish());
  __builtin_unreachable();
}

// `count` stacks, kept from launch to launch because the pages would have to be found again.
inline char* stacks(std::size_t count) {
  static char* memory = nullptr;
  static std::size_t most = 0;
  if (count > most) {
    if (memory) munmap(memory, most * kStack);
    void* pages = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::runtime_error("cuemu: no memory for the stacks of so many threads");
    memory = static_cast<char*>(pages);
    most = count;
    for (std::size_t i = 0; i < count; ++i) mprotect(memory + i * kStack, kGuard, PROT_NONE);
  }
  return memory;
}

inline Launch::Launch(const Schedule& schedule, unsigned blocks_, unsigned threads, const std::function<void()>& body_)
    : grid{blocks_},
      most_resident(schedule.resident),
      cooperative(schedule.cooperative),
      body(body_),
      scheduler(schedule, std::size_t{blocks_} * threads),
      fibers(std::size_t{blocks_} * threads),
      blocks(blocks_) {
  const std::span<Fiber> members(fibers);
  all.members = members;
  for (unsigned b = 0; b < grid.x; ++b) {
    Block& owner = blocks[b];
    owner.index = b;
    owner.alive = threads;
    owner.barrier.members = members.subspan(std::size_t{b} * threads, threads);
    owner.warps.resize((threads + kWarp - 1) / kWarp);
    for (unsigned w = 0; w < owner.warps.size(); ++w)
      owner.warps[w].barrier.members = owner.barrier.members.subspan(w * kWarp, std::min(kWarp, threads - w * kWarp));
    owner.shared = std::make_unique<std::byte[]>(kSharedLimit);
    owner.arrays.reserve(16);
    poison(owner.shared.get(), kSharedLimit);
  }
  for (std::size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.block = &blocks[i / threads];
    fiber.thread = static_cast<unsigned>(i % threads);
#if defined(__SANITIZE_THREAD__)
    fiber.watched = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_THREAD__)
  main.watched = __tsan_get_current_fiber();
#endif
  const std::size_t together = std::min(most_resident, blocks_);
  char* const memory = stacks(together * threads);
  for (std::size_t i = 0; i < together; ++i) free_stacks.push_back(memory + i * threads * kStack);
}

inline Launch::~Launch() {
#if defined(__SANITIZE_THREAD__)
  for (Fiber& fiber : fibers)
    if (fiber.done) __tsan_destroy_fiber(fiber.watched);  // the sanitizer objects to what a failure left in the middle
#endif
}

inline void Launch::start(Block& block) {
  block.stacks = free_stacks.back();
  free_stacks.pop_back();
  for (Fiber& fiber : block.barrier.members) {
    char* const stack = block.stacks + fiber.thread * kStack + kGuard;
    fiber.stack = stack;
    fiber.stack_bytes = kStack - kGuard;
    unpoison(stack, fiber.stack_bytes);
    fiber.context.prepare(stack, fiber.stack_bytes, run_thread);
    scheduler.push(&fiber);
  }
}

inline void Launch::run() {
  std::vector<Block*> waiting;
  for (Block& one : blocks) waiting.push_back(&one);
  scheduler.arrange(waiting);
  while (error.empty()) {
    for (; !waiting.empty() && resident < most_resident; ++resident) {
      start(*waiting.back());
      waiting.pop_back();
    }
    if (scheduler.empty()) break;
    switch_to(next());  // until nobody can run, a block has ended, or the kernel has failed
  }
  finished.acquire();
  for (const Fiber& fiber : fibers) {
    if (!error.empty()) break;
    if (!fiber.done)
      error = fiber.waits_at ? describe(fiber) + " waits for ever for others: " + describe(fiber.waits_at, fiber.place)
                             : describe(fiber) + " was never started";
  }
}

inline void launch(const Schedule& schedule, unsigned blocks, unsigned threads, const std::function<void()>& body) {
  if (blocks == 0 || threads == 0 || threads > 1024 || schedule.resident == 0)
    throw std::runtime_error("cuemu: cannot launch " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads");
  Unwatched unwatched;
  Launch launch(schedule, blocks, threads, body);
  current = &launch;
  launch.run();
  current = nullptr;
  if (!launch.error.empty()) throw std::runtime_error("cuemu: " + launch.error);
}

}  // namespace cuemu

// ---- CUDA, as far as csrc/cuda uses it -----------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

#define threadIdx (cuemu::Dimension{cuemu::self().thread})
#define blockIdx (cuemu::Dimension{cuemu::self().block->index})
#define gridDim (cuemu::current->grid)

#define SHARED_ARRAY(T, name, size) \
  static const char name##_tag = 0; \
  T(&name)[(size)] = *static_cast<T(*)[(size)]>(cuemu::shared_array(&name##_tag, sizeof(T) * (size)))

inline void __syncthreads(cuemu::Place place = cuemu::Place::current()) {
  cuemu::Unwatched unwatched;
  cuemu::meet(cuemu::self().block->barrier, "__syncthreads", place, true);
}

inline void __grid_sync(cuemu::Place place = cuemu::Place::current()) {
  cuemu::Unwatched unwatched;
  if (!cuemu::current->cooperative) cuemu::fail("__grid_sync in a launch that is not cooperative");
  if (cuemu::current->most_resident < cuemu::current->grid.x)
    cuemu::fail("__grid_sync, but not every block of the grid is resident");
  cuemu::meet(cuemu::current->all, "__grid_sync", place, true);
}

inline cuemu::Warp& warp_of(unsigned mask, const char* function, const cuemu::Place& place) {
  if (mask != 0xffffffffu) cuemu::fail(cuemu::describe(function, place) + ": the mask is not full");
  cuemu::Warp& warp = cuemu::self().block->warps[cuemu::self().thread / cuemu::kWarp];
  if (warp.barrier.members.size() < cuemu::kWarp) cuemu::fail(cuemu::describe(function, place) + ": a partial warp");
  return warp;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, cuemu::Place place = cuemu::Place::current()) {
  cuemu::Unwatched unwatched;
  cuemu::meet(warp_of(mask, "__syncwarp", place).barrier, "__syncwarp", place, true);
}

// Exchanges values and orders nothing else, as on a GPU.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, cuemu::Place place = cuemu::Place::current()) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "shuffles carry 4 or 8 bytes");
  cuemu::Unwatched unwatched;
  cuemu::Warp& warp = warp_of(mask, "__shfl_xor_sync", place);
  std::uint64_t* const slots = warp.exchanged[warp.barrier.turn % 2];
  const unsigned lane = cuemu::self().thread % cuemu::kWarp;
  std::memcpy(&slots[lane], &value, sizeof(T));
  cuemu::meet(warp.barrier, "__shfl_xor_sync", place, false);
  std::memcpy(&value, &slots[(lane ^ static_cast<unsigned>(lane_mask)) % cuemu::kWarp], sizeof(T));
  return value;
}

// Atomics order nothing by themselves; fences do. Both let the schedule choose, because other blocks can see them.
template <class T>
T atomicAdd(T* address, T value) {
  cuemu::yield();
  const T before = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  cuemu::yield();
  return before;
}

inline void __threadfence() {
  cuemu::current->fence.acquire();
  cuemu::current->fence.release();
  cuemu::yield();
}

template <class Word>
void hide(Word&) {}  // of csrc/cuda/portable.cuh: matters to nvcc alone

// The two 16-bit types, as far as kernels read and write them.
struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float units = static_cast<float>(mantissa + (exponent ? 1024 : 0));
  float magnitude = mantissa ? NAN : HUGE_VALF;
  if (exponent < 31) magnitude = std::ldexp(units, std::max(exponent, 1) - 25);
  return x.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  const unsigned sign = std::bit_cast<std::uint32_t>(x) >> 16 & 0x8000u;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (magnitude == 0.0f) return {static_cast<std::uint16_t>(sign)};
  int exponent;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 11, -24);
  // A mantissa of 2048, where rounding has carried, is one more in the exponent.
  const unsigned mantissa = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, -unit)));
  return {static_cast<std::uint16_t>(sign | ((static_cast<unsigned>(unit + 24) << 10) + mantissa))};
}

inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
