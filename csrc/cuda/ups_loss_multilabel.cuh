// ups_loss_multilabel: the binary cross-entropy of the selected classes of each image of a batch [N, C], divided by how
// many they are, and the gradient. Formulas in math/multilabel.inl.
//
// The forward reads logits and masks once and writes one number (or one a row); no probability exists in memory. The
// backward counts a row's selected classes and computes the exponential again. Mapping: a team of 4 to 256 threads per
// row (plan.h); sums over rows are formed in an order that the shape alone decides.
#pragma once

#include "loss.cuh"
#include "multilabel.cuh"

namespace ups::cuda {
namespace {

template <class T>
struct MultilabelRows {
  const T* logits;  // [N, C], classes contiguous
  int64_t row_stride;
  int64_t rows;  // N
  int classes;   // C
  Mask positive;
  Mask negative;
  const Acc<T>* weight;        // [N], or null: all are 1
  const Acc<T>* entry_weight;  // [N, C], classes contiguous, or null: all are 1
  int64_t entry_stride;

  __device__ __forceinline__ Acc<T> weight_of(int64_t row) const { return weight ? weight[row] : Acc<T>(1); }
  __device__ __forceinline__ Acc<T> weight_of(int64_t row, int c) const {
    return entry_weight ? entry_weight[row * entry_stride + c] : Acc<T>(1);
  }
};

// Over a row's selected classes: their number, and the sum of their weighted losses.
template <class A>
struct SelectedSums {
  A loss;
  int count;

  __device__ __forceinline__ A mean() const { return count > 0 ? loss / static_cast<A>(count) : A(0); }
};

struct AddSelectedSums {
  template <class A>
  __device__ __forceinline__ SelectedSums<A> operator()(const SelectedSums<A>& a, const SelectedSums<A>& b) const {
    return {a.loss + b.loss, a.count + b.count};
  }
};

// All lanes must reach this. `wanted`: false leaves the sums empty. An entry of weight 0 is counted, not looked at.
template <bool kForward, class T, int kThreadsPerRow>
__device__ __forceinline__ SelectedSums<Acc<T>> selected_sums(const MultilabelRows<T>& a, int64_t row, bool wanted,
                                                              Team<kThreadsPerRow>& team) {
  using A = Acc<T>;
  SelectedSums<A> sums = {0, 0};
  for (int c = team.lane(); wanted && c < a.classes; c += kThreadsPerRow) {
    const bool positive = a.positive.at(row, c);
    if (!positive && !a.negative.at(row, c)) continue;
    sums.count += 1;
    if constexpr (kForward) {
      const A weight = a.weight_of(row, c);
      if (weight == 0) continue;
      const A z = to_acc(a.logits[row * a.row_stride + c]), s = positive ? -z : z;
      sums.loss += weight * absent_loss(s, std::log1p(std::exp(minus_size(s))));
    }
  }
  return team.reduce(sums, AddSelectedSums{});
}

template <class T, int kThreadsPerRow>
__global__ void __launch_bounds__(kLossMaxThreads)
    ups_loss_multilabel_rows(const MultilabelRows<T> a, Acc<T>* row_loss /* [N], or null */,
                             const LossOutput<Acc<T>, 1> out) {
  Team<kThreadsPerRow> team;
  GroupSums<Acc<T>, 1> sums = {};
  for_rows<kThreadsPerRow>(a.rows, [&](int64_t row, bool exists) {
    const Acc<T> weight = a.weight_of(row);
    const auto selected = selected_sums<true>(a, row, weight != 0, team);
    if (!exists || team.lane() != 0) return;
    if (selected.count > 0) sums.add(0, selected.mean(), weight);
    if (row_loss != nullptr) row_loss[row] = weight * selected.mean();
  });
  finish_block(out, sums);
}

// d_loss is [N] with its stride, or [] with stride 0.
template <class T, int kThreadsPerRow>
__global__ void __launch_bounds__(kLossThreads, kLossResident)
    ups_loss_multilabel_backward_rows(const MultilabelRows<T> a, const Acc<T>* d_loss, int64_t d_loss_stride,
                                      const Acc<T>* scale /* [] */, T* d_logits /* [N, C] */) {
  using A = Acc<T>;
  Team<kThreadsPerRow> team;
  for_rows<kThreadsPerRow>(a.rows, [&](int64_t row, bool exists) {
    const A weight = a.weight_of(row);
    const int count = selected_sums<false>(a, row, weight != 0, team).count;
    if (!exists) return;
    const A factor = count > 0 ? d_loss[row * d_loss_stride] * *scale * weight / static_cast<A>(count) : A(0);
    for (int c = team.lane(); c < a.classes; c += kThreadsPerRow) {
      A d = 0;
      const bool positive = a.positive.at(row, c);
      const A of_entry = a.weight_of(row, c);
      if (count > 0 && of_entry != 0 && (positive || a.negative.at(row, c))) {
        const A z = to_acc(a.logits[row * a.row_stride + c]), s = positive ? -z : z;
        const A e = std::exp(minus_size(s));
        const A slope = factor * of_entry * sigmoid_of(s, e, 1 / (1 + e));
        d = positive ? -slope : slope;
      }
      store(d_logits + row * a.classes + c, d);
    }
  });
}

template <class T, class Launch>
void launch_ups_loss_multilabel(Launch& launch, const LaunchPlan& plan, const MultilabelRows<T>& rows,
                                int64_t reduction, Acc<T>* loss /* [], or [N] */, Acc<T>* scale /* [] */) {
  const auto kernel = loss_kernel(plan, [](auto n) { return ups_loss_multilabel_rows<T, decltype(n)::value>; });
  const auto out = loss_output<1>(loss, scale, reduction, rows.rows);
  launch_loss(launch, plan, kernel, out, rows, reduction == kNone ? loss : nullptr);
}

template <class T, class Launch>
void launch_ups_loss_multilabel_backward(Launch& launch, const LaunchPlan& plan, const MultilabelRows<T>& rows,
                                         const Acc<T>* d_loss, int64_t d_loss_stride, const Acc<T>* scale,
                                         T* d_logits) {
  const auto kernel =
      loss_kernel(plan, [](auto n) { return ups_loss_multilabel_backward_rows<T, decltype(n)::value>; });
  launch(plan, kernel, rows, d_loss, d_loss_stride, scale, d_logits);
}

}  // namespace
}  // namespace ups::cuda
