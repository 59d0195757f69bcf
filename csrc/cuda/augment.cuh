// augment: uint8 images in, gathered, augmented as math/pixels.inl says, normalized and written channels last.
//
// Never materialized: the gathered or the augmented bytes of a batch. Mapping: a block per image, which stays in shared
// memory (two copies) from the gather to the normalization, or, where it is too large (some 190x190 pixels in color on
// an H100), in global memory that the block has for itself; a thread works on every so many pixels of it. What is
// drawn is drawn here, one thread for each operation. augment_plan: a thread per image.
#pragma once

#include <cstdint>

#include "../augment.h"
#include "intrinsics.cuh"
#include "plan.h"

namespace ups::cuda {
namespace {

#include "../math/row_math.inl"

#include "../math/draws.inl"
#include "../math/pixels.inl"

struct Block {
  template <class F>
  __device__ __forceinline__ void each(int n, const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) f(i);
  }
  template <class F>
  __device__ __forceinline__ void each_pixel(int H, int W, const F& f) const {
    each(H * W, [&](int i) { f(i / W, i % W); });
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void add(int32_t* to, int32_t x) const { atomicAdd(to, x); }
  __device__ __forceinline__ void least(int32_t* to, int32_t x) const { atomicMin(to, x); }
  __device__ __forceinline__ void most(int32_t* to, int32_t x) const { atomicMax(to, x); }
};

template <int C, class Word, bool kShared>
__global__ void __launch_bounds__(256)
    augment_block(const AugmentArgs<Word> a, int64_t images, uint8_t* global /* [blocks, canvas_bytes], or null */) {
  const Block team;
  uint8_t* memory;
  if constexpr (kShared) {
    memory = dynamic_shared();
  } else {
    memory = global + blockIdx.x * canvas_bytes(a.H, a.W, C, a.settings.n_ops).total;
  }
  for (int64_t b = blockIdx.x; b < images; b += gridDim.x) {
    const bool fits = a.index[b] >= 0 && a.index[b] < a.N &&
                      (a.plan == nullptr || plan_fits(a, a.plan + b * plan_words(a.settings.n_ops)));
    if (!fits) __trap();  // as torch's indexing does: an error that the next synchronization reports
    augment_image(canvas_in<C>(memory, team, a), a, b);
  }
}

__global__ void augment_plan_rows(const DrawArgs a, int64_t images, int32_t* plan /* [B, plan_words] */) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b >= images) return;
  for (int slot = 0; slot < a.settings.n_ops + 3; ++slot) {
    draw_slot(a, b, slot, plan + b * plan_words(a.settings.n_ops));
  }
}

}  // namespace
}  // namespace ups::cuda
