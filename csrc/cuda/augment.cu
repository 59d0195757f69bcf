// The launchers of augment and their registration; the device code is in augment.cuh.
#include "augment.cuh"

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
                  const Tensor& draw_number, std::optional<Tensor> plan, std::vector<int64_t> settings) {
  const AugmentCall call(out, images, index, variants, operations, blends, norm, seed, draw_number, plan, settings);
  check_beside("out", out, images);
  check_beside("index", index, images);
  check_beside("variants", variants, images);
  check_beside("operations", operations, images);
  check_beside("blends", blends, images);
  check_beside("norm", norm, images);
  check_beside("seed", seed, images);
  check_beside("draw", draw_number, images);
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
                         const Tensor& draw_number, int64_t H, int64_t W, std::vector<int64_t> settings) {
  const DrawArgs args = draw_args(index, variants, operations, seed, draw_number, H, W, settings);
  check_beside("variants", variants, index);
  check_beside("operations", operations, index);
  check_beside("seed", seed, index);
  check_beside("draw", draw_number, index);
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
