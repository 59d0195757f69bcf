// fixmatch_loss on the CPU: cross-entropy of the strong view's rows against the confident pseudo-labels of the weak
// view, and the gradient. Formulas in math/fixmatch.inl.
//
// Never materialized: the probabilities of either view. A thread takes blocks of one vector's width of rows, a row in
// each lane (fixmatch_loss.inl). The forward leaves the pseudo-label of each row that counts, or -1; the backward reads
// these and the strong logits, and computes the softmax again.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../fixmatch_loss_call.h"
#include "isa.h"
#include "scratch.h"

namespace ups {

using c10::BFloat16;
using c10::Half;

template <class S>
struct Rows {
  const S* data;   // [N, C], the last dimension dense
  int64_t stride;  // of a row
  const S* end;    // behind the last row
};

template <class S, class T>
struct FixmatchArgs {
  Rows<S> strong, weak;
  int64_t C;
  T inv_temperature, tau;
  const T* class_tau;  // [C], or null
  const T* weight;     // [N], or null
  T* ce;               // [N], 0 where a row counts for nothing
  bool* mask;          // [N]
  int64_t* target;     // [N]
};

template <class S, class T>
struct FixmatchBackwardArgs {
  Rows<S> strong;
  int64_t C;
  const int64_t* target;  // [N]
  const T* d_loss;        // [N] with a stride
  int64_t d_loss_stride;
  const T* weight;  // [N], or null
  T scale;
  S* d_strong;  // [N, C]
};

}  // namespace ups

#define UPS_ISA_SOURCE "fixmatch_loss.inl"
#include "each_isa.h"

namespace ups {
namespace {

// A thread takes rows in multiples of the widest vector, so that results do not depend on the number of threads.
constexpr int64_t kRows = 16;

template <class F>
void for_rows(int64_t n_rows, int64_t n_classes, const F& f) {
  const int64_t grain = 1 + 16384 / (n_classes * kRows);
  torch::stable::parallel_for(0, (n_rows + kRows - 1) / kRows, grain,
                              [&](int64_t begin, int64_t end) { f(begin * kRows, std::min(end * kRows, n_rows)); });
}

template <class S>
Rows<S> rows_of(const Tensor& x) {
  const S* const from = data<const S>(x);
  return {from, x.stride(0), x.size(0) > 0 ? from + (x.size(0) - 1) * x.stride(0) + x.size(1) : from};
}

template <class S, class T>
void forward(const FixmatchCall& call) {
  const T* const weight = data_or_null<T>(call.weight);
  std::vector<T> sums(call.each ? 0 : call.N);
  T* const ce = call.each ? data<T>(call.loss) : sums.data();
  const FixmatchArgs<S, T> args = {
      rows_of<S>(call.strong),  rows_of<S>(call.weak),           call.C, static_cast<T>(call.inv_temperature),
      static_cast<T>(call.tau), data_or_null<T>(call.class_tau), weight, ce,
      data<bool>(call.mask),    data<int64_t>(call.target)};
  for_rows(call.N, call.C, [&](int64_t begin, int64_t end) { UPS_ISA_CALL(fixmatch_rows, args, begin, end); });

  double sum = 0, weights = 0;  // in row order, whatever the number of threads
  for (int64_t i = 0; i < call.N; ++i) {
    if (args.target[i] < 0) continue;
    const T w = weight ? weight[i] : T(1);
    sum += static_cast<double>(w) * ce[i];
    weights += w;
    if (call.each) ce[i] *= w;
  }
  const double scale = 1 / (call.divisor != 0 ? call.divisor : weights != 0 ? weights : 1);
  *data<T>(call.scale) = static_cast<T>(scale);
  if (!call.each) *data<T>(call.loss) = static_cast<T>(scale * sum);
}

template <class S, class T>
void backward(const FixmatchBackwardCall& call) {
  const FixmatchBackwardArgs<S, T> args = {rows_of<S>(call.strong),
                                           call.C,
                                           data<const int64_t>(call.target),
                                           data<const T>(call.d_loss),
                                           call.d_loss_stride,
                                           data_or_null<T>(call.weight),
                                           *data<const T>(call.scale),
                                           data<S>(call.d_strong)};
  for_rows(call.N, call.C, [&](int64_t begin, int64_t end) { UPS_ISA_CALL(d_fixmatch_rows, args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fixmatch_loss_cpu(const Tensor& strong, const Tensor& weak,
                                                             std::optional<Tensor> class_tau, double tau,
                                                             double temperature, int64_t reduction,
                                                             std::optional<Tensor> weight) {
  const FixmatchCall call(strong, weak, class_tau, tau, temperature, reduction, weight);
  dispatch_logits(call.strong,
                  [&](auto storage, auto compute) { forward<decltype(storage), decltype(compute)>(call); });
  return call.result();
}

Tensor fixmatch_loss_backward_cpu(const Tensor& d_loss, const Tensor& strong, const Tensor& target, const Tensor& scale,
                                  std::optional<Tensor> weight) {
  const FixmatchBackwardCall call(d_loss, strong, target, scale, weight);
  dispatch_logits(call.strong,
                  [&](auto storage, auto compute) { backward<decltype(storage), decltype(compute)>(call); });
  return call.d_strong;
}

}  // namespace
}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) {
  m.impl("fixmatch_loss", TORCH_BOX(&ups::fixmatch_loss_cpu));
  m.impl("fixmatch_loss_backward", TORCH_BOX(&ups::fixmatch_loss_backward_cpu));
}
