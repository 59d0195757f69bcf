// nce_loss: the negative cross-entropy of rows of logits [N, C] under a mask, and its gradient.
//
//   NCE_i = -sum_c g_ic log(max(1 - p_ic, eps)) / (sum_c g_ic + eps)       p = softmax(z)
//
// The forward writes one number (or one a row); neither probabilities nor their logarithms exist in memory. The
// backward computes the softmax again from the logits: two reads and a write, less than a gradient kept by the forward
// pass. Mapping: a team of 4 to 256 threads per row (plan.h); sums over rows are formed in an order that the shape
// alone decides.
#include "loss.cuh"

namespace ups::cuda {
namespace {

template <class T>
struct NceRows {
  const T* logits;  // [N, C], classes contiguous
  int64_t row_stride;
  int64_t rows;  // N
  int classes;   // C
  Mask mask;
  const Acc<T>* weight;  // [N], or null: all are 1

  __device__ __forceinline__ Acc<T> weight_of(int64_t row) const { return weight ? weight[row] : Acc<T>(1); }
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kLossMaxThreads)
    nce_loss_rows(const NceRows<T> a, Acc<T>* row_loss /* [N], or null */, const LossOutput<Acc<T>, 1> out) {
  Team<kLanes> team;
  GroupSums<Acc<T>, 1> sums = {};
  for_rows<kLanes>(a.rows, [&](int64_t row, bool exists) {
    const T* z = a.logits + row * a.row_stride;
    const auto softmax = softmax_of(z, a.classes, team);
    const Acc<T> weight = a.weight_of(row);
    const auto masked = masked_sums<true>(z, a.classes, a.mask, row, weight != 0, softmax, team);
    if (!exists || team.lane() != 0) return;
    if (masked.count > 0) sums.add(0, masked.nce(), weight);
    if (row_loss != nullptr) row_loss[row] = weight * masked.nce();  // 0 without a mask
  });
  finish_block(out, sums);
}

// d_loss is [N] with its stride, or [] with stride 0.
template <class T, int kLanes>
__global__ void __launch_bounds__(kLossThreads, kLossResident)
    nce_loss_backward_rows(const NceRows<T> a, const Acc<T>* d_loss, int64_t d_loss_stride,
                           const Acc<T>* scale /* [] */, T* d_logits /* [N, C] */) {
  Team<kLanes> team;
  for_rows<kLanes>(a.rows, [&](int64_t row, bool exists) {
    const T* z = a.logits + row * a.row_stride;
    const auto softmax = softmax_of(z, a.classes, team);
    const Acc<T> row_weight = a.weight_of(row);
    const auto masked = masked_sums<false>(z, a.classes, a.mask, row, row_weight != 0, softmax, team);
    if (!exists) return;
    const Acc<T> weight = d_loss[row * d_loss_stride] * *scale * row_weight;
    const auto gradient = nce_gradient(softmax, masked, a.mask, row, a.classes, weight);
    for (int c = team.lane(); c < a.classes; c += kLanes) {
      store(d_logits + row * a.classes + c, gradient.at(to_acc(z[c]), c, a.mask.at(row, c)));
    }
  });
}

template <class T>
auto nce_loss_kernel(int variant) {
  return pick_kernel(kLossVariants, variant,
                     [](auto i) { return nce_loss_rows<T, kLossVariants[decltype(i)::value].lanes>; });
}

template <class T>
auto nce_loss_backward_kernel(int variant) {
  return pick_kernel(kLossVariants, variant,
                     [](auto i) { return nce_loss_backward_rows<T, kLossVariants[decltype(i)::value].lanes>; });
}

}  // namespace
}  // namespace ups::cuda

#ifndef UPS_FAST_SHIM  // the rest needs torch
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
  const bool each = reduction == kNone;
  const Tensor loss = each ? new_losses(logits, {logits.size(0)}) : new_losses(logits, {});
  const Tensor scale = new_losses(logits, {});

  const DeviceGuard guard(logits.get_device_index());
  const LaunchPlan plan = loss_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    const double divisor = divisor_of(reduction, logits.size(0));
    const LossOutput<A, 1> out = {each ? nullptr : data<A>(loss), data<A>(scale), divisor, nullptr};
    const NceRows<T> rows = nce_rows<T>(logits, mask, weight);
    launch_loss("nce_loss", nce_loss_kernel<T>(plan.variant), plan, logits, out, rows, each ? data<A>(loss) : nullptr);
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
  const LaunchPlan plan = loss_backward_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    const NceRows<T> rows = nce_rows<T>(logits, mask, weight);
    launch("nce_loss_backward", nce_loss_backward_kernel<T>(plan.variant), plan, logits, rows, data<const A>(d_loss),
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
#endif
