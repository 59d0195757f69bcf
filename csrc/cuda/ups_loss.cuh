// ups_loss: cross-entropy of the positive rows of a batch [B, C] + negative cross-entropy of its negative rows, and the
// gradient.
//
// Which rows are which stays on the device. Neither probabilities nor their logarithms exist in memory, and the
// backward computes the softmax again from the logits.
// Mapping: a team of 4 to 256 threads per row (plan.h); sums over rows are formed in an order that the shape alone
// decides.
#pragma once

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

template <class T, int kThreadsPerRow>
__global__ void __launch_bounds__(kLossMaxThreads)
    ups_loss_rows(const UpsRows<T> a, Acc<T>* row_loss /* [B], or null */, const LossOutput<Acc<T>, 2> out) {
  using A = Acc<T>;
  Team<kThreadsPerRow> team;
  GroupSums<A, 2> sums = {};
  for_rows<kThreadsPerRow>(a.rows, [&](int64_t row, bool exists) {
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

template <class T, int kThreadsPerRow>
__global__ void __launch_bounds__(kLossThreads, kLossResident)
    ups_loss_backward_rows(const UpsRows<T> a, const Acc<T>* d_loss, int64_t d_loss_stride,
                           const Acc<T>* scale /* [2] */, T* d_logits /* [B, C] */) {
  using A = Acc<T>;
  Team<kThreadsPerRow> team;
  for_rows<kThreadsPerRow>(a.rows, [&](int64_t row, bool exists) {
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
      for (int c = team.lane(); c < a.classes; c += kThreadsPerRow) store(d_row + c, A(0));
    } else if (positive && a.spread) {  // p_c sum t - t_c
      const SpreadTarget<T> target(a, row);
      const A weight = d_row_loss * scale[kPositive];
      const A top = softmax.top_class < a.classes ? target(softmax.top_class) : A(NAN);
      for (int c = team.lane(); c < a.classes; c += kThreadsPerRow) {
        const A p = softmax.p(to_acc(z[c]), c), t = target(c);
        const bool is_top = c == softmax.top_class;
        store(d_row + c, weight * (is_top ? sum.others * p - t * softmax.not_p(p, c) : (sum.others + top) * p - t));
      }
    } else if (positive) {  // p_c - [c = t]
      const int t = a.target_of(row);
      const A weight = t < 0 ? A(NAN) : d_row_loss * scale[kPositive];
      for (int c = team.lane(); c < a.classes; c += kThreadsPerRow) {
        const A p = softmax.p(to_acc(z[c]), c);
        store(d_row + c, weight * (c == t ? -softmax.not_p(p, c) : p));
      }
    } else {
      const auto gradient = nce_gradient(softmax, masked, a.negative, row, a.classes, d_row_loss * scale[kNegative]);
      for (int c = team.lane(); c < a.classes; c += kThreadsPerRow) {
        store(d_row + c, gradient.at(to_acc(z[c]), c, masked.count > 0 && a.negative.at(row, c)));
      }
    }
  });
}

// Of `target` and `soft` one is null, `negative.data` and `weight` may be.
template <class T>
UpsRows<T> ups_rows(const T* logits, int64_t row_stride, int64_t rows, int classes, const int64_t* target,
                    const Acc<T>* soft, int64_t soft_stride, double smoothing, const bool* positive,
                    const Mask& negative, const Acc<T>* weight) {
  using A = Acc<T>;
  const bool spread = soft != nullptr || smoothing != 0;
  return {logits,
          row_stride,
          rows,
          classes,
          target,
          soft,
          soft_stride,
          spread,
          static_cast<A>(1 - smoothing),
          static_cast<A>(smoothing / classes),
          positive,
          negative,
          weight};
}

template <class T, class Launch>
void launch_ups_loss(Launch& launch, const LaunchPlan& plan, const UpsRows<T>& rows, int64_t reduction,
                     Acc<T>* loss /* [], or [B] */, Acc<T>* scale /* [2] */) {
  const auto kernel = loss_kernel(plan, [](auto n) { return ups_loss_rows<T, decltype(n)::value>; });
  const auto out = loss_output<2>(loss, scale, reduction, rows.rows);
  launch_loss(launch, plan, kernel, out, rows, reduction == kNone ? loss : nullptr);
}

template <class T, class Launch>
void launch_ups_loss_backward(Launch& launch, const LaunchPlan& plan, const UpsRows<T>& rows, const Acc<T>* d_loss,
                              int64_t d_loss_stride, const Acc<T>* scale, T* d_logits) {
  const auto kernel = loss_kernel(plan, [](auto n) { return ups_loss_backward_rows<T, decltype(n)::value>; });
  launch(plan, kernel, rows, d_loss, d_loss_stride, scale, d_logits);
}

}  // namespace
}  // namespace ups::cuda
