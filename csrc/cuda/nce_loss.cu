// The launchers of nce_loss and their registration; the device code is in nce_loss.cuh.
#include "nce_loss.cuh"

#include "loss_launch.cuh"

namespace ups::cuda {
namespace {

template <class T>
NceRows<T> nce_rows(const Tensor& logits, const Tensor& mask, const Tensor& weight) {
  return {data<const T>(logits), logits.stride(0),
          logits.size(0),        static_cast<int>(logits.size(1)),
          mask_of(mask),         data_or_null<Acc<T>>(weight)};
}

std::tuple<Tensor, Tensor> nce_loss_cuda(const Tensor& logits_in, const Tensor& mask_in, int64_t reduction,
                                         std::optional<Tensor> weight_in) {
  const Tensor logits = checked_logits(logits_in), mask = checked_mask("mask", mask_in, logits);
  const Tensor weight = weight_beside(weight_in, logits);
  const Tensor loss = reduction == kNone ? new_losses(logits, {logits.size(0)}) : new_losses(logits, {});
  const Tensor scale = new_losses(logits, {});

  const DeviceGuard guard(logits.get_device_index());
  LossLaunch launch("nce_loss", logits);
  const LaunchPlan plan = loss_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    launch_nce_loss(launch, plan, nce_rows<T>(logits, mask, weight), reduction, data<A>(loss), data<A>(scale));
  });
  return {loss, scale};
}

Tensor nce_loss_backward_cuda(const Tensor& d_loss, const Tensor& logits_in, const Tensor& mask_in, const Tensor& scale,
                              std::optional<Tensor> weight_in) {
  const Tensor logits = checked_logits(logits_in), mask = checked_mask("mask", mask_in, logits);
  check_gradient_beside(d_loss, scale, 1, logits);
  const Tensor d_logits = torch::stable::new_empty(logits, logits.sizes());
  const Tensor weight = weight_beside(weight_in, logits);
  if (d_logits.numel() == 0) return d_logits;

  const DeviceGuard guard(logits.get_device_index());
  LossLaunch launch("nce_loss_backward", logits);
  const LaunchPlan plan = loss_backward_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    launch_nce_loss_backward(launch, plan, nce_rows<T>(logits, mask, weight), data<const A>(d_loss),
                             d_loss.dim() == 0 ? 0 : d_loss.stride(0), data<const A>(scale), data<T>(d_logits));
  });
  return d_logits;
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) {
  m.impl("nce_loss", TORCH_BOX(&ups::cuda::nce_loss_cuda));
  m.impl("nce_loss_backward", TORCH_BOX(&ups::cuda::nce_loss_backward_cuda));
}
