// Runs a CUDA kernel on the CPU: one block after another, each of its threads as a fiber.
//
// A fiber runs until it meets others: at a warp primitive it waits for the lanes of its mask, at a barrier for the
// block. In between, a warp drawn from a seed runs ahead of all others as far as it can, its lanes in an order drawn
// too, so that code which relies on an order (a missing barrier, say) gives other results for other seeds. What cannot
// come to a good end is reported, not waited for: a lane of the mask that has exited or stands at another primitive, a
// barrier that some threads never reach.
//
// This proves indexing and logic. It knows nothing of speed, of memory ordering, or of what a compiler for a GPU does.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace shim {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// A kernel with its arguments bound, for every thread of a grid of `blocks` blocks of `threads` threads with `shared`
// bytes of dynamic shared memory. Returns what went wrong, or an empty string.
std::string run_grid(int64_t blocks, int threads, uint64_t seed, const std::function<void()>& kernel,
                     size_t shared = 0);

// The rest is called by kernels.

enum class Primitive { shuffle, vote, sync_warp };

// Waits for the lanes of `mask`, which must come with the same primitive and detail; then the values of all of them.
using Lanes = std::array<uint64_t, 32>;
Lanes meet_warp(Primitive primitive, unsigned mask, unsigned detail, uint64_t value);

void meet_block();

int current_lane();

uint8_t* dynamic_shared();

// Ends the launch with an error of the current thread.
[[noreturn]] void fail(const char* what);

}  // namespace shim

// Of the thread that is running.
extern shim::Dim3 threadIdx, blockIdx, blockDim, gridDim;
