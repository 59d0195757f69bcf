// The launchers of mc_select_multilabel and their registration; the device code is in mc_select_multilabel.cuh.
#include "mc_select_multilabel.cuh"

#include <optional>

#include "../loss_call.h"
#include "launch.cuh"

namespace ups::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> mc_select_multilabel_cuda(const Tensor& logits_in, double tau_p,
                                                                     double tau_n, double kappa_p, double kappa_n,
                                                                     double temp_nl, bool packed,
                                                                     std::optional<Tensor> class_thresholds) {
  check_dim("logits", logits_in, 3);
  const Tensor logits = dense_rows(logits_in);
  const int64_t P = logits.size(0), N = logits.size(1), C = logits.size(2);
  UPS_CHECK(P >= 1 && P <= INT32_MAX && C >= 1 && C <= kMaxClasses, "logits must have at least one pass and 1 to ",
            kMaxClasses, " classes, got [", P, ", ", N, ", ", C, "]");
  if (class_thresholds) check_beside("class_thresholds", *class_thresholds, logits);
  const Tensor of_class = checked_class_thresholds(class_thresholds, logits);

  const auto result = new_multilabel_selection(logits, packed);
  if (N == 0) return result;

  const DeviceGuard guard(logits.get_device_index());
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    const auto& [confidence, deviation, positive, negative] = result;
    const auto args =
        multilabel_args(data<const T>(logits), logits.stride(0), logits.stride(1), P, N, C,
                        {tau_p, tau_n, kappa_p, kappa_n, temp_nl}, data_or_null<A>(of_class), data<A>(confidence),
                        data<A>(deviation), positive.data_ptr(), negative.data_ptr(), packed);
    launch("mc_select_multilabel", multilabel_kernel<T>(packed, args.width),
           mc_select_multilabel_plan(N, C, packed, args.width), logits, args);
  });
  return result;
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) {
  m.impl("mc_select_multilabel", TORCH_BOX(&ups::cuda::mc_select_multilabel_cuda));
}
