// augment: uint8 images in, gathered, augmented as math/pixels.inl says, normalized and written channels last.
//
// Never materialized: the gathered or the augmented bytes of a batch. Mapping: a block per image, which stays in shared
// memory (two copies) from the gather to the normalization, or, where it is too large (some 190x190 pixels in color on
// an H100), in global memory that the block has for itself; a thread works on every so many pixels of it. What is
// drawn is drawn here, one thread for each operation. augment_plan: a thread per image.
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

#ifndef UPS_FAST_SHIM  // the rest needs torch
#include <optional>
#include <vector>

#include "../augment_call.h"
#include "launch.cuh"

namespace ups::cuda {
namespace {

// Bytes of shared memory that a block may ask for.
int64_t shared_bytes(int32_t device) {
  int bytes = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  UPS_CHECK(error == cudaSuccess, "augment: the device does not tell its shared memory: ", cudaGetErrorString(error));
  return bytes;
}

void augment_cuda(const Tensor& out, const Tensor& images, const Tensor& index, const Tensor& variants,
                  const Tensor& operations, const Tensor& blends, const Tensor& norm, const Tensor& seed,
                  const Tensor& epoch, std::optional<Tensor> plan, std::vector<int64_t> settings) {
  const AugmentCall call(out, images, index, variants, operations, blends, norm, seed, epoch, plan, settings);
  check_beside("out", out, images);
  check_beside("index", index, images);
  check_beside("variants", variants, images);
  check_beside("operations", operations, images);
  check_beside("blends", blends, images);
  check_beside("norm", norm, images);
  check_beside("seed", seed, images);
  check_beside("epoch", epoch, images);
  if (plan.has_value()) check_beside("plan", *plan, images);
  if (out.numel() == 0) return;

  const int32_t device = images.get_device_index();
  const DeviceGuard guard(device);
  call.dispatch([&](const auto& args, auto channels) {
    constexpr int C = decltype(channels)::value;
    using Word = std::remove_const_t<std::remove_pointer_t<decltype(args.norm)>>;
    const int64_t B = index.size(0), bytes = canvas_bytes(args.H, args.W, C, args.settings.n_ops).total;
    const LaunchPlan where = augment_plan(B, int64_t{args.H} * args.W, bytes, shared_bytes(device));
    if (where.variant == 1) {
      const Tensor global = torch::stable::new_empty(images, {where.blocks, bytes});
      return launch("augment", augment_block<C, Word, false>, where, images, args, B, data<uint8_t>(global));
    }
    const auto kernel = augment_block<C, Word, true>;
    if (where.shared > 48 << 10) {  // more than a block has unless it asks
      const cudaError_t refused =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, where.shared);
      UPS_CHECK(refused == cudaSuccess, "augment: ", where.shared,
                " bytes of shared memory were refused: ", cudaGetErrorString(refused));
    }
    launch("augment", kernel, where, images, args, B, static_cast<uint8_t*>(nullptr));
  });
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
