// nce_loss: the negative cross-entropy of rows of logits [N, C] under a mask, and its gradient.
//
//   NCE_i = -sum_c g_ic log(max(1 - p_ic, eps)) / (sum_c g_ic + eps)       p = softmax(z)
//
// The forward writes one number (or one a row); neither probabilities nor their logarithms exist in memory. The
// backward computes the softmax again from the logits: two reads and a write, less than a gradient kept by the forward
// pass. Mapping: a team of 4 to 256 threads per row (plan.h); sums over rows are formed in an order that the shape
// alone decides.
#pragma once

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

template <class T, int kThreadsPerRow>
__global__ void __launch_bounds__(kLossMaxThreads)
    nce_loss_rows(const NceRows<T> a, Acc<T>* row_loss /* [N], or null */, const LossOutput<Acc<T>, 1> out) {
  Team<kThreadsPerRow> team;
  GroupSums<Acc<T>, 1> sums = {};
  for_rows<kThreadsPerRow>(a.rows, [&](int64_t row, bool exists) {
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
template <class T, int kThreadsPerRow>
__global__ void __launch_bounds__(kLossThreads, kLossResident)
    nce_loss_backward_rows(const NceRows<T> a, const Acc<T>* d_loss, int64_t d_loss_stride,
                           const Acc<T>* scale /* [] */, T* d_logits /* [N, C] */) {
  Team<kThreadsPerRow> team;
  for_rows<kThreadsPerRow>(a.rows, [&](int64_t row, bool exists) {
    const T* z = a.logits + row * a.row_stride;
    const auto softmax = softmax_of(z, a.classes, team);
    const Acc<T> row_weight = a.weight_of(row);
    const auto masked = masked_sums<false>(z, a.classes, a.mask, row, row_weight != 0, softmax, team);
    if (!exists) return;
    const Acc<T> weight = d_loss[row * d_loss_stride] * *scale * row_weight;
    const auto gradient = nce_gradient(softmax, masked, a.mask, row, a.classes, weight);
    for (int c = team.lane(); c < a.classes; c += kThreadsPerRow) {
      store(d_logits + row * a.classes + c, gradient.at(to_acc(z[c]), c, a.mask.at(row, c)));
    }
  });
}

template <class T, class Launch>
void launch_nce_loss(Launch& launch, const LaunchPlan& plan, const NceRows<T>& rows, int64_t reduction,
                     Acc<T>* loss /* [], or [N] */, Acc<T>* scale /* [] */) {
  const auto kernel = loss_kernel(plan, [](auto n) { return nce_loss_rows<T, decltype(n)::value>; });
  const auto out = loss_output<1>(loss, scale, reduction, rows.rows);
  launch_loss(launch, plan, kernel, out, rows, reduction == kNone ? loss : nullptr);
}

template <class T, class Launch>
void launch_nce_loss_backward(Launch& launch, const LaunchPlan& plan, const NceRows<T>& rows, const Acc<T>* d_loss,
                              int64_t d_loss_stride, const Acc<T>* scale, T* d_logits) {
  const auto kernel = loss_kernel(plan, [](auto n) { return nce_loss_backward_rows<T, decltype(n)::value>; });
  launch(plan, kernel, rows, d_loss, d_loss_stride, scale, d_logits);
}

}  // namespace
}  // namespace ups::cuda
