// ups_loss: cross-entropy of the positive rows of a batch [B, C] + negative cross-entropy of its negative rows, and the
// gradient.
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
  const int64_t* target;  // [B], read in positive rows only; or null
  const Acc<T>* soft;     // [B, C], read in positive rows only, classes contiguous; or null
  int64_t soft_stride;
  bool spread;           // the target of a row is not one class, but keep * target + even
  Acc<T> keep, even;     // 1 - smoothing, smoothing / C
  const bool* positive;  // [B]
  Mask negative;         // read in the other rows only
  const Acc<T>* weight;  // [B], or null: all are 1

  __device__ __forceinline__ Acc<T> weight_of(int64_t row) const { return weight ? weight[row] : Acc<T>(1); }

  // -1 for one out of range: the row's loss and gradient are then NaN, because to raise would be to wait.
  __device__ __forceinline__ int target_of(int64_t row) const {
    const int64_t t = target[row];
    return t >= 0 && t < classes ? static_cast<int>(t) : -1;
  }
};

// The target of each class of a row: keep * target + even.
template <class T>
struct SpreadTarget {
  using A = Acc<T>;
  const A* soft;  // [C], or null
  int target;     // or -1
  A keep, even;

  __device__ __forceinline__ SpreadTarget(const UpsRows<T>& a, int64_t row)
      : soft(a.soft ? a.soft + row * a.soft_stride : nullptr),
        target(soft || !a.positive[row] ? 0 : a.target_of(row)),
        keep(a.keep),
        even(target < 0 ? A(NAN) : a.even) {}
  __device__ __forceinline__ A operator()(int c) const {
    return (soft ? keep * soft[c] : c == target ? keep : A(0)) + even;
  }
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kLossMaxThreads)
    ups_loss_rows(const UpsRows<T> a, Acc<T>* row_loss /* [B], or null */, const LossOutput<Acc<T>, 2> out) {
  using A = Acc<T>;
  Team<kLanes> team;
  GroupSums<A, 2> sums = {};
  for_rows<kLanes>(a.rows, [&](int64_t row, bool exists) {
    const T* z = a.logits + row * a.row_stride;
    const bool positive = a.positive[row];
    const auto softmax = softmax_of(z, a.classes, team);
    const A weight = a.weight_of(row);
    const auto masked = masked_sums<true>(z, a.classes, a.negative, row, !positive && weight != 0, softmax, team);
    A loss = masked.nce();
    if (a.spread) {  // the same for all threads
      const SpreadTarget<T> target(a, row);
      const auto sum = target_sums(z, a.classes, target, positive && weight != 0, softmax, team);
      const A top = softmax.top_class < a.classes ? target(softmax.top_class) : A(NAN);
      if (positive) loss = (sum.others + top) * std::log1p(softmax.rest) + sum.cross;
    }
    if (!exists || team.lane() != 0) return;
    if (positive && !a.spread) {
      const int t = weight != 0 ? a.target_of(row) : 0;
      loss = t < 0 ? A(NAN) : softmax.top - to_acc(z[t]) + std::log1p(softmax.rest);
    }
    if (weight != 0 && (positive || masked.count > 0)) sums.add(positive ? kPositive : kNegative, loss, weight);
    if (row_loss != nullptr) row_loss[row] = weight != 0 ? weight * loss : A(0);
  });
  finish_block(out, sums);
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kLossThreads, kLossResident)
    ups_loss_backward_rows(const UpsRows<T> a, const Acc<T>* d_loss, int64_t d_loss_stride,
                           const Acc<T>* scale /* [2] */, T* d_logits /* [B, C] */) {
  using A = Acc<T>;
  Team<kLanes> team;
  for_rows<kLanes>(a.rows, [&](int64_t row, bool exists) {
    const T* z = a.logits + row * a.row_stride;
    T* d_row = d_logits + row * a.classes;
    const bool positive = a.positive[row];
    const auto softmax = softmax_of(z, a.classes, team);
    const A row_weight = a.weight_of(row);
    const bool counts = row_weight != 0;
    const auto masked = masked_sums<false>(z, a.classes, a.negative, row, !positive && counts, softmax, team);
    TargetSums<A> sum = {};
    if (a.spread) sum = target_sums(z, a.classes, SpreadTarget<T>(a, row), positive && counts, softmax, team);
    if (!exists) return;
    const A d_row_loss = d_loss[row * d_loss_stride] * row_weight;
    if (!counts) {
      for (int c = team.lane(); c < a.classes; c += kLanes) store(d_row + c, A(0));
    } else if (positive && a.spread) {  // p_c sum t - t_c
      const SpreadTarget<T> target(a, row);
      const A weight = d_row_loss * scale[kPositive];
      const A top = softmax.top_class < a.classes ? target(softmax.top_class) : A(NAN);
      for (int c = team.lane(); c < a.classes; c += kLanes) {
        const A p = softmax.p(to_acc(z[c]), c), t = target(c);
        const bool is_top = c == softmax.top_class;
        store(d_row + c, weight * (is_top ? sum.others * p - t * softmax.not_p(p, c) : (sum.others + top) * p - t));
      }
    } else if (positive) {  // p_c - [c = t]
      const int t = a.target_of(row);
      const A weight = t < 0 ? A(NAN) : d_row_loss * scale[kPositive];
      for (int c = team.lane(); c < a.classes; c += kLanes) {
        const A p = softmax.p(to_acc(z[c]), c);
        store(d_row + c, weight * (c == t ? -softmax.not_p(p, c) : p));
      }
    } else {
      const auto gradient = nce_gradient(softmax, masked, a.negative, row, a.classes, d_row_loss * scale[kNegative]);
      for (int c = team.lane(); c < a.classes; c += kLanes) {
        store(d_row + c, gradient.at(to_acc(z[c]), c, masked.count > 0 && a.negative.at(row, c)));
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
    return {data<const T>(logits),
            logits.stride(0),
            logits.size(0),
            static_cast<int>(logits.size(1)),
            is_class ? data<const int64_t>(target) : nullptr,
            is_class ? nullptr : data<const A>(target),
            is_class ? 0 : target.stride(0),
            !is_class || smoothing != 0,
            static_cast<A>(1 - smoothing),
            static_cast<A>(smoothing / static_cast<double>(logits.size(1))),
            data<const bool>(positive),
            mask_of(negative),
            data_or_null<A>(weight)};
  }

  const Tensor logits, target, positive, negative, weight;  // the last two undefined if there are none
  const double smoothing;
};

std::tuple<Tensor, Tensor> ups_loss_cuda(const Tensor& logits, const Tensor& target, const Tensor& positive,
                                         std::optional<Tensor> negative, int64_t reduction,
                                         std::optional<Tensor> weight, double smoothing) {
  const UpsArguments args(logits, target, positive, negative, weight, smoothing);
  const bool each = reduction == kNone;
  const Tensor loss = each ? new_losses(logits, {logits.size(0)}) : new_losses(logits, {});
  const Tensor scale = new_losses(logits, {2});

  const DeviceGuard guard(logits.get_device_index());
  const LaunchPlan plan = loss_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    const double divisor = divisor_of(reduction, logits.size(0));
    const LossOutput<A, 2> out = {each ? nullptr : data<A>(loss), data<A>(scale), divisor, nullptr};
    launch_loss("ups_loss", ups_loss_kernel<T>(plan.variant), plan, logits, out, args.rows<T>(),
                each ? data<A>(loss) : nullptr);
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
  const LaunchPlan plan = loss_backward_plan(logits.size(0), logits.size(1));
  dispatch_logits(logits, [&](auto storage, auto acc) {
    using T = DeviceType<decltype(storage)>;
    using A = decltype(acc);
    launch("ups_loss_backward", ups_loss_backward_kernel<T>(plan.variant), plan, logits, args.rows<T>(),
           data<const A>(d_loss), d_loss.dim() == 0 ? 0 : d_loss.stride(0), data<const A>(scale), data<T>(d_logits));
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
