// augment: uint8 images in, gathered, augmented as math/pixels.inl says, normalised and written channels last.
//
// Never materialised: the gathered or the augmented bytes of a batch. Mapping: a block per image, which stays in shared
// memory (two copies) from the gather to the normalisation; a thread works on every so many pixels of it. What is drawn
// is drawn here, one thread for each operation. augment_plan: a thread per image.
#include <cstdint>

#include "../augment.h"
#include "plan.h"

namespace ups::cuda {
namespace {

#include "../math/row_math.inl"

#include "../math/draws.inl"
#include "../math/pixels.inl"

#ifndef UPS_FAST_SHIM
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<uint8_t*>(memory);
}
#else
using shim::dynamic_shared;
#endif

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

template <int C, class Word>
__global__ void __launch_bounds__(256) augment_block(const AugmentArgs<Word> a) {
  const int64_t b = blockIdx.x;
  const bool fits = a.index[b] >= 0 && a.index[b] < a.N &&
                    (a.plan == nullptr || plan_fits(a, a.plan + b * plan_words(a.settings.n_ops)));
  if (!fits) __trap();  // as torch's indexing does: an error that the next synchronisation reports
  const Block team;
  augment_image(canvas_in<C>(dynamic_shared(), team, a), a, b);
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

#ifndef UPS_FAST_SHIM  // the rest needs torch
#include <optional>
#include <vector>

#include "../augment_call.h"
#include "launch.cuh"

namespace ups::cuda {
namespace {

Tensor augment_cuda(const Tensor& images, const Tensor& index, const Tensor& variants, const Tensor& operations,
                    const Tensor& blends, const Tensor& norm, const Tensor& seed, const Tensor& epoch,
                    std::optional<Tensor> plan, std::vector<int64_t> settings) {
  const AugmentCall call(images, index, variants, operations, blends, norm, seed, epoch, plan, settings);
  check_beside("index", index, images);
  check_beside("variants", variants, images);
  check_beside("operations", operations, images);
  check_beside("blends", blends, images);
  check_beside("norm", norm, images);
  check_beside("seed", seed, images);
  check_beside("epoch", epoch, images);
  if (plan.has_value()) check_beside("plan", *plan, images);
  if (call.out.numel() == 0) return call.out;

  const DeviceGuard guard(images.get_device_index());
  call.dispatch([&](const auto& args, auto channels) {
    constexpr int C = decltype(channels)::value;
    const auto kernel = augment_block<C, std::remove_const_t<std::remove_pointer_t<decltype(args.norm)>>>;
    const size_t bytes = canvas_bytes(args.H, args.W, C, args.settings.n_ops).total;
    const LaunchPlan launch_plan = augment_plan(index.size(0), int64_t{args.H} * args.W, bytes);
    if (bytes > 48 << 10) {  // more than a block has unless it asks
      const cudaError_t refused =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
      if (refused != cudaSuccess) {
        cudaGetLastError();  // forgets it
        UPS_CHECK(false, "images of ", args.H, "x", args.W, "x", C, " need ", bytes,
                  " bytes of shared memory, more than a block of this GPU has");
      }
    }
    launch("augment", kernel, launch_plan, images, args);
  });
  return call.out;
}

Tensor augment_plan_cuda(const Tensor& index, const Tensor& variants, const Tensor& operations, const Tensor& seed,
                         const Tensor& epoch, int64_t H, int64_t W, std::vector<int64_t> settings) {
  const DrawArgs args = draw_args(index, variants, operations, seed, epoch, H, W, settings);
  check_beside("variants", variants, index);
  check_beside("operations", operations, index);
  check_beside("seed", seed, index);
  check_beside("epoch", epoch, index);
  const Tensor plan = new_plan(index, args);
  if (plan.numel() == 0) return plan;
  const DeviceGuard guard(index.get_device_index());
  launch("augment_plan", augment_plan_rows, draw_plan(index.size(0)), index, args, index.size(0), data<int32_t>(plan));
  return plan;
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) {
  m.impl("augment", TORCH_BOX(&ups::cuda::augment_cuda));
  m.impl("augment_plan", TORCH_BOX(&ups::cuda::augment_plan_cuda));
}
#endif
