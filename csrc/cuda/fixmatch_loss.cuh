// fixmatch_loss: cross-entropy of the strong view's rows of a batch [N, C] against the confident pseudo-labels of the
// weak view, and the gradient. Formulas in math/fixmatch.inl.
//
// The forward reads both views once, the strong one only in rows that count, and writes 9 bytes a row: mask and target.
// No probability exists in memory. The backward reads targets and strong logits, and computes the softmax again.
// Mapping: a team of 4 to 256 threads per row (plan.h); sums over rows are formed in an order that the shape alone
// decides.
#pragma once

#include "loss.cuh"

namespace ups::cuda {
namespace {

#include "../math/fixmatch.inl"

template <class T>
struct FixmatchRows {
  const T* strong;  // [N, C], classes contiguous
  int64_t strong_stride;
  const T* weak;  // [N, C], classes contiguous
  int64_t weak_stride;
  int64_t rows;  // N
  int classes;   // C
  Acc<T> inv_temperature;
  Acc<T> tau;
  const Acc<T>* class_tau;  // [C], or null: tau holds for every class
  const Acc<T>* weight;     // [N], or null: all are 1
};

// The most probable class of a weak row, the lowest of a tie, and its probability: NaN where a logit is not finite.
template <class A>
struct PseudoLabel {
  A confidence;
  int label;
};

template <class T, int kThreadsPerRow>
__device__ __forceinline__ PseudoLabel<Acc<T>> pseudo_label(const T* w /* [C] */, int classes, Acc<T> inv_temperature,
                                                            Team<kThreadsPerRow>& team) {
  using A = Acc<T>;
  RowSummary<A> row = {A(-INFINITY), 0, INT_MAX};
  for (int c = team.lane(); c < classes; c += kThreadsPerRow) {
    const A z = to_acc(w[c]);
    row.add(z * inv_temperature, c);
    row.rest += 0 * z;  // 0 * NaN and 0 * inf are NaN
  }
  row = team.reduce(row, MergeSummaries{});
  return {1 / (1 + row.rest), row.top_class};
}

template <class T, int kThreadsPerRow>
__global__ void __launch_bounds__(kLossMaxThreads)
    fixmatch_loss_rows(const FixmatchRows<T> a, bool* mask /* [N] */, int64_t* target /* [N] */,
                       Acc<T>* row_loss /* [N], or null */, const LossOutput<Acc<T>, 1> out) {
  using A = Acc<T>;
  Team<kThreadsPerRow> team;
  GroupSums<A, 1> sums = {};
  for_rows<kThreadsPerRow>(a.rows, [&](int64_t row, bool exists) {
    const auto found = pseudo_label(a.weak + row * a.weak_stride, a.classes, a.inv_temperature, team);
    const A tau = a.class_tau && found.label < a.classes ? a.class_tau[found.label] : a.tau;
    const bool masked = found.confidence >= tau;
    const A weight = a.weight ? a.weight[row] : A(1);
    const bool counts = masked && weight != 0;
    const T* z = a.strong + row * a.strong_stride;
    const auto softmax = softmax_of(z, counts ? a.classes : 0, team);  // all threads must reach its shuffles
    if (!exists || team.lane() != 0) return;
    const A loss = counts ? fixmatch_ce(std::log1p(softmax.rest), softmax.top, to_acc(z[found.label])) : A(0);
    if (counts) sums.add(0, loss, weight);
    mask[row] = masked;
    target[row] = counts ? found.label : -1;
    if (row_loss != nullptr) row_loss[row] = counts ? weight * loss : A(0);
  });
  finish_block(out, sums);
}

// d_loss is [N] with its stride, or [] with stride 0.
template <class T, int kThreadsPerRow>
__global__ void __launch_bounds__(kLossThreads, kLossResident)
    fixmatch_loss_backward_rows(const FixmatchRows<T> a /* of the strong view alone */, const int64_t* target /* [N] */,
                                const Acc<T>* d_loss, int64_t d_loss_stride, const Acc<T>* scale /* [] */,
                                T* d_strong /* [N, C] */) {
  using A = Acc<T>;
  Team<kThreadsPerRow> team;
  for_rows<kThreadsPerRow>(a.rows, [&](int64_t row, bool exists) {
    const T* z = a.strong + row * a.strong_stride;
    const int64_t label = target[row];
    const bool counts = label >= 0;
    const auto softmax = softmax_of(z, counts ? a.classes : 0, team);
    if (!exists) return;
    const A factor = d_loss[row * d_loss_stride] * *scale * (a.weight ? a.weight[row] : A(1));
    for (int c = team.lane(); c < a.classes; c += kThreadsPerRow) {
      A d = 0;
      if (counts) {
        const bool is_top = c == softmax.top_class;
        const A e = is_top ? A(1) : std::exp(to_acc(z[c]) - softmax.top);
        d = factor * fixmatch_slope(e, softmax.inv_sum, softmax.rest, is_top, c == label);
      }
      store(d_strong + row * a.classes + c, d);
    }
  });
}

template <class T, class Launch>
void launch_fixmatch_loss(Launch& launch, const LaunchPlan& plan, const FixmatchRows<T>& rows, int64_t reduction,
                          Acc<T>* loss /* [], or [N] */, bool* mask, int64_t* target, Acc<T>* scale /* [] */) {
  const auto kernel = loss_kernel(plan, [](auto n) { return fixmatch_loss_rows<T, decltype(n)::value>; });
  const auto out = loss_output<1>(loss, scale, reduction, rows.rows);
  launch_loss(launch, plan, kernel, out, rows, mask, target, reduction == kNone ? loss : nullptr);
}

template <class T, class Launch>
void launch_fixmatch_loss_backward(Launch& launch, const LaunchPlan& plan, const FixmatchRows<T>& rows,
                                   const int64_t* target, const Acc<T>* d_loss, int64_t d_loss_stride,
                                   const Acc<T>* scale, T* d_strong) {
  const auto kernel = loss_kernel(plan, [](auto n) { return fixmatch_loss_backward_rows<T, decltype(n)::value>; });
  launch(plan, kernel, rows, target, d_loss, d_loss_stride, scale, d_strong);
}

}  // namespace
}  // namespace ups::cuda
