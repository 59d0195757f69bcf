// The launchers of mc_select and their registration; the device code is in mc_select.cuh.
#include "mc_select.cuh"

#include "launch.cuh"

namespace ups::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mc_select_cuda(const Tensor& logits_in, double tau_p, double tau_n,
                                                                  double kappa_p, double kappa_n, double temp_nl,
                                                                  bool packed) {
  check_dim("logits", logits_in, 3);
  const Tensor logits = dense_rows(logits_in);
  const int64_t P = logits.size(0), N = logits.size(1), C = logits.size(2);
  UPS_CHECK(logits.scalar_type() != ScalarType::Double,
            "logits must be float32, float16 or bfloat16 on a CUDA device, got float64");
  UPS_CHECK(P >= 1 && C >= 1 && C <= kMaxClasses, "logits must have at least one pass and 1 to ", kMaxClasses,
            " classes, got [", P, ", ", N, ", ", C, "]");
  const LaunchPlan plan = mc_select_plan(N, C);
  const McSelectVariant variant = kMcSelectVariants[plan.variant];
  UPS_CHECK(P <= (variant.chunks == 0 ? kMcSelectMaxLoopedPasses : INT32_MAX), "logits must have at most ",
            kMcSelectMaxLoopedPasses, " passes with ", C, " classes on a CUDA device, got [", P, ", ", N, ", ", C, "]");

  const auto result = new_selection(logits, packed);
  if (N == 0) return result;

  const DeviceGuard guard(logits.get_device_index());
  dispatch_logits(logits, [&](auto storage, auto) {
    using T = DeviceType<decltype(storage)>;
    if constexpr (!std::is_same_v<T, double>) {
      const auto& [label, confidence, deviation, positive, negative] = result;
      const auto args =
          mc_select_args(plan, data<const T>(logits), logits.stride(0), logits.stride(1), P, N, C,
                         {tau_p, tau_n, kappa_p, kappa_n, temp_nl}, data<int64_t>(label), data<float>(confidence),
                         data<float>(deviation), data<bool>(positive), negative.data_ptr(), packed);
      launch("mc_select", mc_select_kernel<T>(plan.variant), plan, logits, args);
    }
  });
  return result;
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) { m.impl("mc_select", TORCH_BOX(&ups::cuda::mc_select_cuda)); }
