// The launchers of fixmatch_loss and their registration; the device code is in fixmatch_loss.cuh.
#include "fixmatch_loss.cuh"

#include "../fixmatch_loss_call.h"
#include "loss_launch.cuh"

namespace ups::cuda {
namespace {

void check_device(const char* name, const std::optional<Tensor>& x, const Tensor& strong) {
  if (x) check_beside(name, *x, strong);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fixmatch_loss_cuda(const Tensor& strong, const Tensor& weak,
                                                              std::optional<Tensor> class_tau, double tau,
                                                              double temperature, int64_t reduction,
                                                              std::optional<Tensor> weight) {
  check_device("weak", weak, strong);
  check_device("tau", class_tau, strong);
  check_device("weight", weight, strong);
  const FixmatchCall call(strong, weak, class_tau, tau, temperature, reduction, weight);
  checked_logits(call.strong);

  const DeviceGuard guard(strong.get_device_index());
  LossLaunch launch("fixmatch_loss", strong);
  const LaunchPlan plan = loss_plan(call.N, call.C);
  dispatch_logits(strong, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    const FixmatchRows<T> rows = {data<const T>(call.strong),
                                  call.strong.stride(0),
                                  data<const T>(call.weak),
                                  call.weak.stride(0),
                                  call.N,
                                  static_cast<int>(call.C),
                                  static_cast<A>(call.inv_temperature),
                                  static_cast<A>(call.tau),
                                  data_or_null<A>(call.class_tau),
                                  data_or_null<A>(call.weight)};
    launch_fixmatch_loss(launch, plan, rows, reduction, data<A>(call.loss), data<bool>(call.mask),
                         data<int64_t>(call.target), data<A>(call.scale));
  });
  return call.result();
}

Tensor fixmatch_loss_backward_cuda(const Tensor& d_loss, const Tensor& strong, const Tensor& target,
                                   const Tensor& scale, std::optional<Tensor> weight) {
  check_device("d_loss", d_loss, strong);
  check_device("target", target, strong);
  check_device("scale", scale, strong);
  check_device("weight", weight, strong);
  const FixmatchBackwardCall call(d_loss, strong, target, scale, weight);
  checked_logits(call.strong);
  if (call.d_strong.numel() == 0) return call.d_strong;

  const DeviceGuard guard(strong.get_device_index());
  LossLaunch launch("fixmatch_loss_backward", strong);
  const LaunchPlan plan = loss_backward_plan(call.N, call.C);
  dispatch_logits(strong, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    FixmatchRows<T> rows = {};
    rows.strong = data<const T>(call.strong);
    rows.strong_stride = call.strong.stride(0);
    rows.rows = call.N;
    rows.classes = static_cast<int>(call.C);
    rows.weight = data_or_null<A>(call.weight);
    launch_fixmatch_loss_backward(launch, plan, rows, data<const int64_t>(call.target), data<const A>(d_loss),
                                  call.d_loss_stride, data<const A>(scale), data<T>(call.d_strong));
  });
  return call.d_strong;
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) {
  m.impl("fixmatch_loss", TORCH_BOX(&ups::cuda::fixmatch_loss_cuda));
  m.impl("fixmatch_loss_backward", TORCH_BOX(&ups::cuda::fixmatch_loss_backward_cuda));
}
