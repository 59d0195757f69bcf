#include "fibers.h"

#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__  // clang's way to say it
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

shim::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // frames are wide under AddressSanitizer
constexpr int kWarp = 32;

enum class State { ready, at_warp, at_block, done };

// AddressSanitizer can follow swapcontext. Without it a fiber, once started, is entered and left by longjmp, which is
// four times as fast because it leaves the signal mask alone.
#if defined(__SANITIZE_ADDRESS__)
using Scheduler = ucontext_t;
#else
using Scheduler = jmp_buf;
#endif

struct Fiber {
  ucontext_t context;
  void* stack;
#if defined(__SANITIZE_ADDRESS__)
  void* asan_frames = nullptr;  // AddressSanitizer's own stack of a fiber that is not running
#else
  jmp_buf resume;
  bool started = false;
#endif
  State state;
  Primitive primitive;
  unsigned mask, detail;
  uint64_t value;
  Lanes met;
};

class Block;
Block* running = nullptr;

const char* name_of(Primitive primitive) {
  constexpr const char* kNames[] = {"a shuffle", "a vote", "__syncwarp"};
  return kNames[static_cast<int>(primitive)];
}

// A stack for the fiber of this number, kept for later launches.
void* stack_of(size_t i) {
  static std::vector<void*> stacks;
  while (stacks.size() <= i) {
    stacks.push_back(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (stacks.back() == MAP_FAILED) std::abort();
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks[i], kStackBytes);  // a launch that failed has left its frames
#endif
  return stacks[i];
}

// The fibers of a block; they are used again for each block of a grid.
class Block {
 public:
  Block(int threads, uint64_t seed, const std::function<void()>& kernel)
      : kernel_(kernel), random_(seed), fibers_(threads), warps_((threads + kWarp - 1) / kWarp) {
    std::iota(warps_.begin(), warps_.end(), 0);
    std::iota(lanes_.begin(), lanes_.end(), 0);
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.stack = stack_of(i);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::fiber_main, 0);
    }
    running = this;
  }

  ~Block() { running = nullptr; }

  // Runs all threads to their end; false when one failed.
  bool run() {
    for (Fiber& fiber : fibers_) fiber.state = State::ready;
    const auto done = [](const Fiber& fiber) { return fiber.state == State::done; };
    while (!std::all_of(fibers_.begin(), fibers_.end(), done)) {
      std::shuffle(warps_.begin(), warps_.end(), random_);
      // The first warp that can move; the order is drawn anew after it.
      if (std::none_of(warps_.begin(), warps_.end(), [this](int warp) { return run_warp(warp); })) report_standstill();
      if (!error.empty()) return false;
    }
    return true;
  }

  Fiber& current() { return fibers_[current_]; }

  // From a fiber to the scheduler; returns when the fiber is scheduled again.
  void yield() {
    Fiber& fiber = current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber.asan_frames, scheduler_stack_, scheduler_stack_size_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fiber.asan_frames, nullptr, nullptr);
#else
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler_, 1);
#endif
  }

  void set_error(int thread, const std::string& what) {
    error = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread) + ": " + what;
  }

  std::string error;

 private:
  static void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &running->scheduler_stack_, &running->scheduler_stack_size_);
#endif
    for (;;) {  // once for each block
      running->kernel_();
      running->current().state = State::done;
      running->yield();
    }
  }

  void switch_to(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    void* own_frames = nullptr;
    __sanitizer_start_switch_fiber(&own_frames, fiber.stack, kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(own_frames, nullptr, nullptr);
#else
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.context);
#endif
  }

  // Runs a warp until all its lanes wait for other warps or are done; false if they did already.
  bool run_warp(int warp) {
    bool moved = false;
    for (bool moving = true; moving && error.empty();) {
      moving = false;
      std::shuffle(lanes_.begin(), lanes_.end(), random_);
      for (int lane : lanes_) {
        const int thread = warp * kWarp + lane;
        if (thread >= static_cast<int>(fibers_.size()) || fibers_[thread].state != State::ready) continue;
        moved = moving = true;
        current_ = thread;
        threadIdx.x = static_cast<unsigned>(thread);
        switch_to(fibers_[thread]);
        if (error.empty()) arrived(thread);
        if (!error.empty()) break;
      }
    }
    return moved;
  }

  // A fiber has come to a stop: releases those who waited for it, or finds that they wait in vain.
  void arrived(int thread) {
    Fiber& fiber = fibers_[thread];
    if (fiber.state == State::at_block) {
      const auto waits = [](const Fiber& f) { return f.state == State::at_block; };
      if (std::all_of(fibers_.begin(), fibers_.end(), waits)) {
        for (Fiber& f : fibers_) f.state = State::ready;
      }
    } else if (fiber.state == State::at_warp) {
      meet(thread);
    }
  }

  void meet(int thread) {
    Fiber& self = fibers_[thread];
    const int first = thread / kWarp * kWarp;
    if (!(self.mask >> (thread - first) & 1)) return set_error(thread, "is not in the mask that it gives");
    bool all_here = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(self.mask >> lane & 1)) continue;
      if (first + lane >= static_cast<int>(fibers_.size())) {
        return set_error(thread, "the mask names lane " + std::to_string(lane) + ", which the block does not have");
      }
      const Fiber& other = fibers_[first + lane];
      if (other.state == State::at_warp &&
          (other.primitive != self.primitive || other.mask != self.mask || other.detail != self.detail)) {
        return set_error(thread, std::string("stands at ") + name_of(self.primitive) + ", lane " +
                                     std::to_string(lane) + " of its mask at " + name_of(other.primitive) +
                                     " of another kind");
      }
      all_here = all_here && other.state == State::at_warp;
    }
    if (!all_here) return;
    Lanes values{};
    for (int lane = 0; lane < kWarp; ++lane) {
      if (self.mask >> lane & 1) values[lane] = fibers_[first + lane].value;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(self.mask >> lane & 1)) continue;
      fibers_[first + lane].met = values;
      fibers_[first + lane].state = State::ready;
    }
  }

  // No thread can go on: says for whom the first that waits, waits.
  void report_standstill() {
    for (size_t i = 0; i < fibers_.size(); ++i) {
      if (fibers_[i].state == State::done) continue;
      const bool warp = fibers_[i].state == State::at_warp;
      for (size_t k = 0; k < fibers_.size(); ++k) {
        const bool wanted = !warp || (k / kWarp == i / kWarp && fibers_[i].mask >> (k % kWarp) & 1);
        if (!wanted || fibers_[k].state == fibers_[i].state) continue;
        return set_error(static_cast<int>(i),
                         std::string("waits at ") + (warp ? name_of(fibers_[i].primitive) : "__syncthreads") +
                             " for thread " + std::to_string(k) + ", which " +
                             (fibers_[k].state == State::done       ? "has exited"
                              : fibers_[k].state == State::at_block ? "waits at __syncthreads"
                                                                    : "waits for lanes of its warp"));
      }
    }
  }

  const std::function<void()>& kernel_;
  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::vector<int> warps_;          // in the order of this moment
  std::array<int, kWarp> lanes_{};  // likewise
  Scheduler scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
  int current_ = 0;
};

// __shared__ variables are `static thread_local` (cuda_shim.h), so they are this module's thread-local storage and
// nothing else is. All bits set: a NaN, a -1, a true that is not 1.
void poison_shared_memory() {
  const auto visit = [](dl_phdr_info* module, size_t, void*) {
    const auto here = reinterpret_cast<ElfW(Addr)>(&poison_shared_memory);
    const ElfW(Phdr)* storage = nullptr;
    bool ours = false;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const ElfW(Phdr) & part = module->dlpi_phdr[i];
      const ElfW(Addr) start = module->dlpi_addr + part.p_vaddr;
      ours |= part.p_type == PT_LOAD && here >= start && here < start + part.p_memsz;
      if (part.p_type == PT_TLS) storage = &part;
    }
    if (!ours) return 0;
    if (storage && module->dlpi_tls_data) std::memset(module->dlpi_tls_data, 0xff, storage->p_memsz);
    return 1;
  };
  dl_iterate_phdr(visit, nullptr);
}

}  // namespace

uint8_t* dynamic_memory = nullptr;

std::string run_grid(int64_t blocks, int threads, uint64_t seed, const std::function<void()>& kernel, size_t shared) {
  Block block(threads, seed, kernel);
  const std::unique_ptr<uint8_t[]> memory(new uint8_t[shared]);  // of exact size, so that a sanitizer sees its end
  dynamic_memory = memory.get();
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx = {static_cast<unsigned>(i), 0, 0};
    threadIdx = {0, 0, 0};
    poison_shared_memory();
    if (shared) std::memset(dynamic_memory, 0xff, shared);
    if (!block.run()) break;
  }
  return block.error;
}

Lanes meet_warp(Primitive primitive, unsigned mask, unsigned detail, uint64_t value) {
  Fiber& fiber = running->current();
  fiber.primitive = primitive;
  fiber.mask = mask;
  fiber.detail = detail;
  fiber.value = value;
  fiber.state = State::at_warp;
  running->yield();
  return running->current().met;
}

void meet_block() {
  running->current().state = State::at_block;
  running->yield();
}

uint8_t* dynamic_shared() { return dynamic_memory; }

int current_lane() { return static_cast<int>(threadIdx.x) % kWarp; }

void fail(const char* what) {
  running->set_error(static_cast<int>(threadIdx.x), what);
  running->yield();
  std::abort();  // a failed block is not scheduled again
}

}  // namespace shim
