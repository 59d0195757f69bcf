// The launchers of ups_loss_multilabel and their registration; the device code is in ups_loss_multilabel.cuh.
#include "ups_loss_multilabel.cuh"

#include "loss_launch.cuh"

namespace ups::cuda {
namespace {

// The checked arguments of either direction.
struct MultilabelArguments {
  MultilabelArguments(const Tensor& logits_in, const Tensor& positive_in, const Tensor& negative_in,
                      const std::optional<Tensor>& weight_in)
      : logits(checked_logits(logits_in)),
        positive(checked_mask("positive", positive_in, logits)),
        negative(checked_mask("negative", negative_in, logits)),
        weight(weight_beside_entries(weight_in, logits)) {}

  static Tensor weight_beside_entries(const std::optional<Tensor>& weight, const Tensor& logits) {
    if (weight) check_beside("weight", *weight, logits);
    return checked_entry_weight(weight, logits);
  }

  template <class T>
  MultilabelRows<T> rows() const {
    using A = Acc<T>;
    const bool of_entries = weight.defined() && weight.dim() == 2;
    return {data<const T>(logits),
            logits.stride(0),
            logits.size(0),
            static_cast<int>(logits.size(1)),
            mask_of(positive),
            mask_of(negative),
            of_entries ? nullptr : data_or_null<A>(weight),
            of_entries ? data<const A>(weight) : nullptr,
            of_entries ? weight.stride(0) : 0};
  }

  const Tensor logits, positive, negative;
  const Tensor weight;  // [N] or [N, C], or undefined
};

std::tuple<Tensor, Tensor> ups_loss_multilabel_cuda(const Tensor& logits, const Tensor& positive,
                                                    const Tensor& negative, int64_t reduction,
                                                    std::optional<Tensor> weight) {
  const MultilabelArguments args(logits, positive, negative, weight);
  const Tensor loss = reduction == kNone ? new_losses(logits, {logits.size(0)}) : new_losses(logits, {});
  const Tensor scale = new_losses(logits, {});

  const DeviceGuard guard(logits.get_device_index());
  LossLaunch launch("ups_loss_multilabel", logits);
  const LaunchPlan plan = loss_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    launch_ups_loss_multilabel(launch, plan, args.rows<T>(), reduction, data<A>(loss), data<A>(scale));
  });
  return {loss, scale};
}

Tensor ups_loss_multilabel_backward_cuda(const Tensor& d_loss, const Tensor& logits, const Tensor& positive,
                                         const Tensor& negative, const Tensor& scale, std::optional<Tensor> weight) {
  const MultilabelArguments args(logits, positive, negative, weight);
  check_gradient_beside(d_loss, scale, 1, logits);
  const Tensor d_logits = torch::stable::new_empty(logits, logits.sizes());
  if (d_logits.numel() == 0) return d_logits;

  const DeviceGuard guard(logits.get_device_index());
  LossLaunch launch("ups_loss_multilabel_backward", logits);
  const LaunchPlan plan = loss_backward_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    launch_ups_loss_multilabel_backward(launch, plan, args.rows<T>(), data<const A>(d_loss),
                                        d_loss.dim() == 0 ? 0 : d_loss.stride(0), data<const A>(scale),
                                        data<T>(d_logits));
  });
  return d_logits;
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) {
  m.impl("ups_loss_multilabel", TORCH_BOX(&ups::cuda::ups_loss_multilabel_cuda));
  m.impl("ups_loss_multilabel_backward", TORCH_BOX(&ups::cuda::ups_loss_multilabel_backward_cuda));
}
