// mc_select on the CPU: from the logits of P passes to labels, confidences, stds, positives and negatives.
//
//   p = softmax(z), q = softmax(z / temp); mean and M2 over the passes by Welford; label = argmax mean p
//   positive: mean_p[label] >= tau_p and M2_p[label] < kappa_p^2 (P - 1)
//   negative: mean_q[c] < tau_n and M2_q[c] < kappa_n^2 (P - 1) and c != label
//
// Never materialized: probabilities, means or stds of all rows. A thread works through its rows in blocks of one
// vector's width (few classes) or one row (many), with P * C exponentials in cache and each logit read once from
// memory.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../math/row_stats.h"
#include "../tensors.h"
#include "isa.h"
#include "scratch.h"

namespace ups {

using c10::BFloat16;
using c10::Half;

template <class S, class T>
struct McSelectArgs {
  const S* logits;  // [P, N, C], the last dimension dense
  const S* end;     // behind the last of them
  int64_t stride_p, stride_n;
  int64_t P, C;
  Thresholds<T> t;
  const T* inv_k;  // [P], 1 / 1, 1 / 2, ...
  int64_t* label;  // [N]
  T* confidence;   // [N]
  T* deviation;    // [N]
  bool* positive;  // [N]
  void* negative;  // bool [N, C], or int32 [N, ceil(C / 32)]
  bool packed;
};

}  // namespace ups

#define UPS_ISA_SOURCE "mc_select.inl"
#include "each_isa.h"

namespace ups {

template <class S, class T>
void mc_select_typed(McSelectArgs<S, T> args, int64_t n_rows) {
  std::vector<T> inv_k(args.P);
  for (int64_t pass = 0; pass < args.P; ++pass) inv_k[pass] = T(1) / static_cast<T>(pass + 1);
  args.inv_k = inv_k.data();
  // A thread takes rows in multiples of the widest vector, so that only the last block is partly filled, and enough of
  // them to be worth waking it.
  constexpr int64_t kRows = 16;
  const int64_t grain = 1 + 32768 / (args.P * args.C * kRows);
  torch::stable::parallel_for(0, (n_rows + kRows - 1) / kRows, grain, [&](int64_t begin, int64_t end) {
    UPS_ISA_CALL(mc_select_rows, args, begin * kRows, std::min(end * kRows, n_rows));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mc_select_cpu(const Tensor& logits_in, double tau_p, double tau_n,
                                                                 double kappa_p, double kappa_n, double temp_nl,
                                                                 bool packed) {
  check_dim("logits", logits_in, 3);
  const Tensor logits = dense_rows(logits_in);
  const int64_t P = logits.size(0), N = logits.size(1), C = logits.size(2);
  UPS_CHECK(P >= 1 && C >= 1, "logits must have at least one pass and one class, got [", P, ", ", N, ", ", C, "]");

  auto result = new_selection(logits, packed);
  if (N == 0) return result;

  dispatch_logits(logits, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const auto& [label, confidence, deviation, positive, negative] =
        result;  // named here: some clangs capture no such names
    mc_select_typed<S, T>(
        {data<const S>(logits), data<const S>(logits) + (P - 1) * logits.stride(0) + (N - 1) * logits.stride(1) + C,
         logits.stride(0), logits.stride(1), P, C, make_thresholds<T>(tau_p, tau_n, kappa_p, kappa_n, temp_nl, P),
         nullptr, data<int64_t>(label), data<T>(confidence), data<T>(deviation), data<bool>(positive),
         negative.data_ptr(), packed},
        N);
  });
  return result;
}

}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) { m.impl("mc_select", TORCH_BOX(&ups::mc_select_cpu)); }
