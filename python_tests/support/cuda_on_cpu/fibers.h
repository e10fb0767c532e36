#pragma once
// One cluster of blocks of CUDA threads, mostly a single block, on one CPU thread. Every CUDA thread is a fiber that
// runs until it waits, at a barrier of its warp, block or cluster, or ends. All of a warp or block must wait at the
// same place in the source: a barrier that some threads pass by, or reach elsewhere, is an error, as is one that a
// thread will never reach because it has ended.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {

constexpr std::size_t kStackBytes = 64 << 10;

#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};
extern "C" void cuda_on_cpu_switch(void** from, void* to);
// Saves what a call preserves on the stack left, and takes it from the stack entered.
__asm__(
    ".text\n.weak cuda_on_cpu_switch\n.hidden cuda_on_cpu_switch\n.type cuda_on_cpu_switch, @function\n"
    "cuda_on_cpu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size cuda_on_cpu_switch, . - cuda_on_cpu_switch\n");
inline void switch_to(Context& from, Context& to) { cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer); }
inline void start(Context& context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);  // 16-byte aligned
  *--top = nullptr;                                           // where a called function's return address would be
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t context;
};
inline void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
inline void start(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  makecontext(&context.context, entry, 0);
}
#endif

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum class State { ready, at_warp, at_block, at_cluster, failed, ended };

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  State state;
  int line;                 // of the barrier that it waits at
  const char* what;         // the barrier's name
  std::uint64_t values[2];  // given to the warp's last two exchanges: a lane is at most one exchange ahead of another
  unsigned exchanges;
  unsigned arrivals, waits;  // at barriers of the cluster
};

struct Block {
  std::vector<Fiber> fibers;
  unsigned size = 0, current = 0;           // threads, of all blocks of the cluster
  unsigned threads = 0;                     // of one block
  void (*enter)(unsigned block) = nullptr;  // makes its shared memory and index those that threads see
  Context scheduler;
  const std::function<void()>* body = nullptr;
  std::string error;
  unsigned order = 0;  // of warps and lanes; 0: ascending, 1: descending, else shuffled anew each time round
  std::mt19937 random;
};

inline Block block;
inline Dim3 thread_index;

inline Fiber& current() { return block.fibers[block.current]; }

inline void leave(State state, const char* what, int line) {
  Fiber& fiber = current();
  fiber.state = state;
  fiber.what = what;
  fiber.line = line;
  const Dim3 index = thread_index;
  switch_to(fiber.context, block.scheduler);
  thread_index = index;
}

inline void wait_for_cluster(const char* what, int line) {
  if (++current().waits != current().arrivals) leave(State::failed, "wait for the cluster without an arrival", line);
  leave(State::at_cluster, what, line);
}

// Another thread may run here: called at atomics, under the shuffled orders.
inline void preempt() {
  if (block.order > 1 && block.random() % 4 == 0) leave(State::ready, "", 0);
}

inline void run_fiber() {
  (*block.body)();
  leave(State::ended, "", 0);
}

// Frees the threads [begin, end) if they all wait at one barrier of this kind; true if they did.
inline bool release(unsigned begin, unsigned end, State kind) {
  const Fiber& first = block.fibers[begin];
  unsigned waiting = 0;
  for (unsigned i = begin; i < end; ++i) {
    const Fiber& fiber = block.fibers[i];
    waiting += fiber.state == kind && fiber.line == first.line && fiber.what == first.what;
  }
  if (waiting < end - begin) return false;
  for (unsigned i = begin; i < end; ++i) block.fibers[i].state = State::ready;
  return true;
}

// Frees the threads that wait for the cluster's arrivals, once all that have not ended have arrived as often.
inline bool release_cluster() {
  unsigned least = ~0u;
  for (unsigned i = 0; i < block.size; ++i)
    if (block.fibers[i].state != State::ended) least = std::min(least, block.fibers[i].arrivals);
  bool any = false;
  for (unsigned i = 0; i < block.size; ++i) {
    Fiber& fiber = block.fibers[i];
    if (fiber.state != State::at_cluster || fiber.arrivals > least) continue;
    fiber.state = State::ready;
    any = true;
  }
  return any;
}

inline std::string describe_stuck() {
  for (unsigned i = 0; i < block.size; ++i) {
    const Fiber& fiber = block.fibers[i];
    if (fiber.state == State::failed)
      return std::string(fiber.what) + " at line " + std::to_string(fiber.line) + " of thread " + std::to_string(i);
  }
  std::string text = "barrier not reached by every thread:";
  for (unsigned i = 0; i < block.size; ++i) {
    const Fiber& fiber = block.fibers[i];
    if (i && fiber.state == block.fibers[i - 1].state && fiber.line == block.fibers[i - 1].line) continue;
    text += " from thread " + std::to_string(i) + " on ";
    text += fiber.state == State::ended ? "ended" : std::string(fiber.what) + " at line " + std::to_string(fiber.line);
    text += ";";
  }
  return text;
}

// Runs a thread until it waits or ends; false if it was not ready.
inline bool run_thread(unsigned thread) {
  if (block.fibers[thread].state != State::ready) return false;
  block.current = thread;
  thread_index = {thread % block.threads};
  block.enter(thread / block.threads);
  switch_to(block.scheduler, block.fibers[thread].context);
  return true;
}

inline bool run_cluster(unsigned blocks, unsigned threads_of_block, const std::function<void()>& body) {
  const unsigned threads = blocks * threads_of_block;
  block.size = threads;
  block.threads = threads_of_block;
  block.body = &body;
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);  // the thread before never returned
#endif
    fiber.state = State::ready;
    fiber.exchanges = fiber.arrivals = fiber.waits = 0;
    start(fiber.context, fiber.stack.get(), run_fiber);
  }
  std::vector<unsigned> warps(threads / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0u);
  std::iota(lanes.begin(), lanes.end(), 0u);
  if (block.order == 1) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  // Shuffled, one warp stands still for a few rounds, so that the others get as far ahead of it as barriers let them.
  constexpr unsigned kRounds = 8;
  unsigned still = threads;
  for (unsigned round = 0, progress = 1; progress; ++round) {
    progress = 0;
    if (block.order > 1) std::shuffle(warps.begin(), warps.end(), block.random);
    if (block.order > 1 && round % kRounds == 0) still = static_cast<unsigned>(block.random() % warps.size());
    for (unsigned warp : warps) {  // as far as its warp can go alone, or, shuffled, less far
      if (warp == still) continue;
      do {
        if (block.order > 1) std::shuffle(lanes.begin(), lanes.end(), block.random);
        for (unsigned lane : lanes) progress |= run_thread(warp * 32 + lane);
      } while (release(warp * 32, warp * 32 + 32, State::at_warp) && (block.order < 2 || block.random() % 8));
    }
    for (unsigned begin = 0; begin < threads; begin += threads_of_block)
      progress |= release(begin, begin + threads_of_block, State::at_block);
    progress |= release_cluster();
    if (!progress && still < threads) {
      still = threads;
      progress = 1;
    }
  }
  const bool ended = std::all_of(block.fibers.begin(), block.fibers.begin() + threads,
                                 [](const Fiber& fiber) { return fiber.state == State::ended; });
  if (!ended) block.error = describe_stuck();
  return ended;
}

// The value that the lane `source` of this warp gives to the same exchange.
template <typename T, typename Source>
T exchange(T value, Source source, const char* what, int line) {
  static_assert(sizeof(T) <= 8);
  Fiber& fiber = current();
  const unsigned turn = fiber.exchanges++ % 2, me = block.current;
  std::memcpy(&fiber.values[turn], &value, sizeof value);
  leave(State::at_warp, what, line);
  T result;
  std::memcpy(&result, &block.fibers[me / 32 * 32 + source(me % 32)].values[turn], sizeof result);
  return result;
}

}  // namespace cuda_on_cpu
