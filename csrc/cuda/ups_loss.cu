// The launchers of ups_loss and their registration; the device code is in ups_loss.cuh.
#include "ups_loss.cuh"

#include "loss_launch.cuh"

namespace ups::cuda {
namespace {

// The checked arguments of either direction.
struct UpsArguments {
  UpsArguments(const Tensor& logits_in, const Tensor& target_in, const Tensor& positive_in,
               const std::optional<Tensor>& negative_in, const std::optional<Tensor>& weight_in, double smoothing_in)
      : logits(checked_logits(logits_in)),
        target(target_beside(target_in, logits)),
        positive(checked_rows("positive", positive_in, ScalarType::Bool, "bool", logits)),
        negative(negative_in ? checked_mask("negative", *negative_in, logits) : Tensor()),
        weight(weight_beside(weight_in, logits)),
        smoothing(smoothing_in) {}

  static Tensor target_beside(const Tensor& target, const Tensor& logits) {
    check_beside("target", target, logits);
    return checked_target(target, logits);
  }

  template <class T>
  UpsRows<T> rows() const {
    using A = Acc<T>;
    const bool is_class = target.scalar_type() == ScalarType::Long;
    return ups_rows<T>(data<const T>(logits), logits.stride(0), logits.size(0), static_cast<int>(logits.size(1)),
                       is_class ? data<const int64_t>(target) : nullptr, is_class ? nullptr : data<const A>(target),
                       is_class ? 0 : target.stride(0), smoothing, data<const bool>(positive), mask_of(negative),
                       data_or_null<A>(weight));
  }

  const Tensor logits, target, positive, negative, weight;  // the last two undefined if there are none
  const double smoothing;
};

std::tuple<Tensor, Tensor> ups_loss_cuda(const Tensor& logits, const Tensor& target, const Tensor& positive,
                                         std::optional<Tensor> negative, int64_t reduction,
                                         std::optional<Tensor> weight, double smoothing) {
  const UpsArguments args(logits, target, positive, negative, weight, smoothing);
  const Tensor loss = reduction == kNone ? new_losses(logits, {logits.size(0)}) : new_losses(logits, {});
  const Tensor scale = new_losses(logits, {2});

  const DeviceGuard guard(logits.get_device_index());
  LossLaunch launch("ups_loss", logits);
  const LaunchPlan plan = loss_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    launch_ups_loss(launch, plan, args.rows<T>(), reduction, data<A>(loss), data<A>(scale));
  });
  return {loss, scale};
}

Tensor ups_loss_backward_cuda(const Tensor& d_loss, const Tensor& logits, const Tensor& target, const Tensor& positive,
                              std::optional<Tensor> negative, const Tensor& scale, std::optional<Tensor> weight,
                              double smoothing) {
  const UpsArguments args(logits, target, positive, negative, weight, smoothing);
  check_gradient_beside(d_loss, scale, 2, logits);
  const Tensor d_logits = torch::stable::new_empty(logits, logits.sizes());
  if (d_logits.numel() == 0) return d_logits;

  const DeviceGuard guard(logits.get_device_index());
  LossLaunch launch("ups_loss_backward", logits);
  const LaunchPlan plan = loss_backward_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    launch_ups_loss_backward(launch, plan, args.rows<T>(), data<const A>(d_loss),
                             d_loss.dim() == 0 ? 0 : d_loss.stride(0), data<const A>(scale), data<T>(d_logits));
  });
  return d_logits;
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) {
  m.impl("ups_loss", TORCH_BOX(&ups::cuda::ups_loss_cuda));
  m.impl("ups_loss_backward", TORCH_BOX(&ups::cuda::ups_loss_backward_cuda));
}
