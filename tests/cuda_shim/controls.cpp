// Small kernels that show that the shim can tell right from wrong: for each rule one that keeps it and one or more that
// do not. `controls(name, ...)` runs one with 64 threads, each writing out[its number], and returns the report.
#include <map>
#include <string>

#include "cuda_shim.h"

namespace {

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

int thread() { return static_cast<int>(threadIdx.x); }

// Reverses 0 .. 63 through shared memory.
__global__ void with_barrier(int* out) {
  __shared__ int values[kThreads];
  values[thread()] = thread();
  __syncthreads();
  out[thread()] = values[kThreads - 1 - thread()];
}

__global__ void without_barrier(int* out) {
  __shared__ int values[kThreads];
  values[thread()] = thread();
  out[thread()] = values[kThreads - 1 - thread()];
}

__global__ void half_written_shared_memory(int* out) {
  __shared__ int values[kThreads];
  if (thread() < kThreads / 2) values[thread()] = thread();
  __syncthreads();
  out[thread()] = values[thread()];
}

__global__ void barrier_some_skip(int* out) {
  if (thread() < 40) __syncthreads();
  out[thread()] = 0;
}

// The sum of a warp's lanes.
__global__ void shuffle_sum(int* out) {
  int sum = thread();
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  out[thread()] = sum;
}

__global__ void shuffle_some_skip(int* out) {
  out[thread()] = thread() % 32 < 16 ? __shfl_xor_sync(kAll, thread(), 1) : 0;
}

__global__ void shuffle_apart(int* out) {
  out[thread()] = thread() % 2 ? __shfl_xor_sync(kAll, thread(), 1) : __shfl_xor_sync(kAll, thread(), 2);
}

__global__ void shuffle_meets_barrier(int* out) {
  if (thread() % 2) __syncthreads();
  out[thread()] = __shfl_xor_sync(kAll, thread(), 1);
}

__global__ void shuffle_outside_its_mask(int* out) {
  if (thread() % 32 < 8) out[thread()] = __shfl_xor_sync(0xffu, thread(), 8);
}

__global__ void not_in_its_mask(int* out) { out[thread()] = __shfl_xor_sync(0xffu, thread(), 1); }

__global__ void unaligned_load(int* out) {
  out[thread()] = static_cast<int>(__ldg(reinterpret_cast<const uint2*>(out + 1)).x);
}

__global__ void write_past_the_end(int* out) { out[thread() + 1] = thread(); }

__global__ void shared_write_past_the_end(int* out) {
  __shared__ int values[kThreads];
  values[thread() + 1] = thread();
  __syncthreads();
  out[thread()] = values[thread()];
}

const std::map<std::string, void (*)(int*)> kControls = {
    {"with_barrier", with_barrier},
    {"without_barrier", without_barrier},
    {"half_written_shared_memory", half_written_shared_memory},
    {"barrier_some_skip", barrier_some_skip},
    {"shuffle_sum", shuffle_sum},
    {"shuffle_some_skip", shuffle_some_skip},
    {"shuffle_apart", shuffle_apart},
    {"shuffle_meets_barrier", shuffle_meets_barrier},
    {"shuffle_outside_its_mask", shuffle_outside_its_mask},
    {"not_in_its_mask", not_in_its_mask},
    {"unaligned_load", unaligned_load},
    {"write_past_the_end", write_past_the_end},
    {"shared_write_past_the_end", shared_write_past_the_end},
};

}  // namespace

extern "C" const char* control(const char* name, uint64_t seed, int* out /* [64] */) {
  static std::string report;
  report = shim::run_grid(1, kThreads, seed, [&] { kControls.at(name)(out); });
  return report.c_str();
}
