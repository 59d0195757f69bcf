// The threads that share one row, and reductions over them.
#pragma once

#include <cstdint>
#include <cstring>

namespace ups::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The value of the lane whose number differs in the bits of `offset`. V: any plain struct of 4-byte words.
template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int offset) {
  static_assert(sizeof(V) % 4 == 0, "shuffles move 4-byte words");
  unsigned words[sizeof(V) / 4];
  std::memcpy(words, &value, sizeof value);
#pragma unroll
  for (unsigned& word : words) word = __shfl_xor_sync(kAllLanes, word, offset);
  std::memcpy(&value, words, sizeof value);
  return value;
}

constexpr int kWholeBlock = 1024;  // a team of any number of warps

// kThreadsPerRow neighboring threads: a power of two up to a warp; or more than a warp, and then the team is the whole
// block.
//
// `reduce` must be reached by every thread of the block together, with an `op` whose result does not depend on the
// order of its two arguments. Every lane then gets the same bits, whatever the order in which warps run: lanes meet
// in a butterfly, warps are folded in order. In a team of several warps it is a barrier too: what a thread wrote
// before, all see after.
template <int kThreadsPerRow>
class Team {
 public:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kThreadsPerRow; }

  template <class V, class Op>
  __device__ __forceinline__ V reduce(V value, Op op) {
#pragma unroll
    for (int offset = (kThreadsPerRow < kWarp ? kThreadsPerRow : kWarp) / 2; offset > 0; offset /= 2) {
      value = op(value, shuffle_xor(value, offset));
    }
    if constexpr (kThreadsPerRow > kWarp) value = fold_warps(value, op);
    return value;
  }

 private:
  // Two sets of slots in turn: a warp that is ahead writes the next reduction's values while another still reads
  // these; it cannot be two ahead, because of the barrier in between.
  template <class V, class Op>
  __device__ __forceinline__ V fold_warps(V value, Op op) {
    __shared__ V slots[2][kWarp];
    turn_ ^= 1;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    if (threadIdx.x % kWarp == 0) slots[turn_][warp] = value;
    __syncthreads();
    value = slots[turn_][0];
    const int n_warps = static_cast<int>(blockDim.x) / kWarp;
    for (int i = 1; i < n_warps; ++i) value = op(value, slots[turn_][i]);
    return value;
  }

  int turn_ = 0;
};

struct BitOr {
  __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b) const { return a | b; }
};

}  // namespace ups::cuda
