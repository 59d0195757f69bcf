// ups_loss: mean cross-entropy of the positive rows of a batch [B, C] + mean negative cross-entropy of its negative
// rows, and the gradient.
//
// Which rows are which stays on the device. Neither probabilities nor their logarithms exist in memory, and the
// backward computes the softmax again from the logits.
// Mapping: a team of 4 to 256 threads per row (plan.h); sums over rows are formed in an order that the shape alone
// decides.
#include "loss.cuh"

namespace ups::cuda {
namespace {

constexpr int kPositive = 0, kNegative = 1;  // the two groups of rows

template <class T>
struct UpsRows {
  const T* logits;  // [B, C], classes contiguous
  int64_t row_stride;
  int64_t rows;           // B
  int classes;            // C
  const int64_t* target;  // [B], read in positive rows only
  const bool* positive;   // [B]
  Mask negative;          // read in the other rows only

  // -1 for one out of range: the row's loss and gradient are then NaN, because to raise would be to wait.
  __device__ __forceinline__ int target_of(int64_t row) const {
    const int64_t t = target[row];
    return t >= 0 && t < classes ? static_cast<int>(t) : -1;
  }
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kLossMaxThreads) ups_loss_rows(const UpsRows<T> a, const LossOutput<Acc<T>, 2> out) {
  using A = Acc<T>;
  Team<kLanes> team;
  GroupSums<A, 2> sums = {};
  for_rows<kLanes>(a.rows, [&](int64_t row, bool exists) {
    const T* z = a.logits + row * a.row_stride;
    const bool positive = a.positive[row];
    const auto softmax = softmax_of(z, a.classes, team);
    const auto masked = masked_sums<true>(z, a.classes, a.negative, row, !positive, softmax, team);
    if (!exists || team.lane() != 0) return;
    if (positive) {
      const int t = a.target_of(row);
      sums.add(kPositive, t < 0 ? A(NAN) : softmax.top - to_acc(z[t]) + std::log1p(softmax.rest));
    } else if (masked.count > 0) {
      sums.add(kNegative, masked.nce());
    }
  });
  finish_block(out, sums);
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kLossThreads, kLossResident)
    ups_loss_backward_rows(const UpsRows<T> a, const Acc<T>* d_loss /* [] */, const Acc<T>* scale /* [2] */,
                           T* d_logits /* [B, C] */) {
  using A = Acc<T>;
  Team<kLanes> team;
  for_rows<kLanes>(a.rows, [&](int64_t row, bool exists) {
    const T* z = a.logits + row * a.row_stride;
    T* d_row = d_logits + row * a.classes;
    const bool positive = a.positive[row];
    const auto softmax = softmax_of(z, a.classes, team);
    const auto masked = masked_sums<false>(z, a.classes, a.negative, row, !positive, softmax, team);
    if (!exists) return;
    if (positive) {  // p_c - [c = t]
      const int t = a.target_of(row);
      const A weight = t < 0 ? A(NAN) : *d_loss * scale[kPositive];
      for (int c = team.lane(); c < a.classes; c += kLanes) {
        const A p = softmax.p(to_acc(z[c]), c);
        store(d_row + c, weight * (c == t ? -softmax.not_p(p, c) : p));
      }
    } else {
      const auto gradient = nce_gradient(softmax, masked, a.negative, row, a.classes, *d_loss * scale[kNegative]);
      for (int c = team.lane(); c < a.classes; c += kLanes) {
        store(d_row + c, gradient.at(to_acc(z[c]), c, a.negative.at(row, c)));
      }
    }
  });
}

template <class T>
auto ups_loss_kernel(int variant) {
  return pick_kernel(kLossVariants, variant,
                     [](auto i) { return ups_loss_rows<T, kLossVariants[decltype(i)::value].lanes>; });
}

template <class T>
auto ups_loss_backward_kernel(int variant) {
  return pick_kernel(kLossVariants, variant,
                     [](auto i) { return ups_loss_backward_rows<T, kLossVariants[decltype(i)::value].lanes>; });
}

}  // namespace
}  // namespace ups::cuda

#ifndef UPS_FAST_SHIM  // the rest needs torch
#include "loss_launch.cuh"

namespace ups::cuda {
namespace {

// The checked arguments of either direction.
struct UpsArguments {
  UpsArguments(const Tensor& logits_in, const Tensor& target_in, const Tensor& positive_in, const Tensor& negative_in)
      : logits(checked_logits(logits_in)),
        target(checked_rows("target", target_in, ScalarType::Long, "int64", logits)),
        positive(checked_rows("positive", positive_in, ScalarType::Bool, "bool", logits)),
        negative(checked_mask("negative", negative_in, logits)) {}

  template <class T>
  UpsRows<T> rows() const {
    return {data<const T>(logits),       logits.stride(0),           logits.size(0),   static_cast<int>(logits.size(1)),
            data<const int64_t>(target), data<const bool>(positive), mask_of(negative)};
  }

  const Tensor logits, target, positive, negative;
};

std::tuple<Tensor, Tensor> ups_loss_cuda(const Tensor& logits, const Tensor& target, const Tensor& positive,
                                         const Tensor& negative) {
  const UpsArguments args(logits, target, positive, negative);
  const Tensor loss = new_losses(logits, {}), scale = new_losses(logits, {2});

  const DeviceGuard guard(logits.get_device_index());
  const LaunchPlan plan = loss_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    const LossOutput<A, 2> out = {data<A>(loss), data<A>(scale), true, nullptr};
    launch_loss("ups_loss", ups_loss_kernel<T>(plan.variant), plan, logits, out, args.rows<T>());
  });
  return {loss, scale};
}

Tensor ups_loss_backward_cuda(const Tensor& d_loss, const Tensor& logits, const Tensor& target, const Tensor& positive,
                              const Tensor& negative, const Tensor& scale) {
  const UpsArguments args(logits, target, positive, negative);
  check_values("d_loss", d_loss, logits);
  check_values("scale", scale, logits);
  const Tensor d_logits = torch::stable::new_empty(logits, logits.sizes());
  if (d_logits.numel() == 0) return d_logits;

  const DeviceGuard guard(logits.get_device_index());
  const LaunchPlan plan = loss_backward_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    launch("ups_loss_backward", ups_loss_backward_kernel<T>(plan.variant), plan, logits, args.rows<T>(),
           data<const A>(d_loss), data<const A>(scale), data<T>(d_logits));
  });
  return d_logits;
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) {
  m.impl("ups_loss", TORCH_BOX(&ups::cuda::ups_loss_cuda));
  m.impl("ups_loss_backward", TORCH_BOX(&ups::cuda::ups_loss_backward_cuda));
}
#endif
