// ups_loss_multilabel on the CPU: the binary cross-entropy of the selected classes of each image, divided by how many
// they are, and the gradient. Formulas in math/multilabel.inl.
//
// Never materialized: a probability. Images are shared out among threads; the classes of one lie in the lanes of SIMD
// vectors. The backward reads logits and masks again and computes the exponential again.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../loss_call.h"
#include "../math/loss_row.h"
#include "isa.h"
#include "loss_rows.h"

namespace ups {

using c10::BFloat16;
using c10::Half;

template <class S, class T>
struct MultilabelRows {
  const S* logits;  // [N, C], rows dense
  int64_t stride;
  int64_t C;
  const Mask &positive, &negative;
  const T* entry_weight;  // [N, C], rows dense, or null
  int64_t entry_stride;
  const T* weight;  // [N], or null
};

}  // namespace ups

#define UPS_ISA_SOURCE "ups_loss_multilabel.inl"
#include "each_isa.h"

namespace ups {
namespace {

// The checked arguments of either direction.
struct MultilabelCall {
  MultilabelCall(const Tensor& logits_in, const Tensor& positive_in, const Tensor& negative_in,
                 const std::optional<Tensor>& weight_in)
      : logits((check_dim("logits", logits_in, 2), dense_rows(logits_in))),
        N(logits.size(0)),
        C(logits.size(1)),
        positive("positive", positive_in, N, C),
        negative("negative", negative_in, N, C),
        weight(checked_entry_weight(weight_in, logits)) {}

  template <class S, class T>
  MultilabelRows<S, T> rows() const {
    const bool of_entries = weight.defined() && weight.dim() == 2;
    return {data<const S>(logits),
            logits.stride(0),
            C,
            positive,
            negative,
            of_entries ? data<const T>(weight) : nullptr,
            of_entries ? weight.stride(0) : 0,
            of_entries ? nullptr : data_or_null<T>(weight)};
  }

  // f(begin, end) of images that are shared out among threads.
  template <class F>
  void for_rows(const F& f) const {
    torch::stable::parallel_for(0, N, 1 + 16384 / C, f);
  }

  const Tensor logits;
  const int64_t N, C;
  const Mask positive, negative;
  const Tensor weight;  // compute_type [N] or [N, C], or undefined: all are 1
};

std::tuple<Tensor, Tensor> ups_loss_multilabel_cpu(const Tensor& logits, const Tensor& positive, const Tensor& negative,
                                                   int64_t reduction, std::optional<Tensor> weight) {
  const MultilabelCall call(logits, positive, negative, weight);
  const bool each = reduction == kNone;
  const Tensor loss = each ? torch::stable::new_empty(logits, {call.N}, compute_type(logits))
                           : torch::stable::new_empty(logits, {}, compute_type(logits));
  const Tensor scale = torch::stable::new_empty(logits, {}, compute_type(logits));
  dispatch_logits(logits, [&](auto storage, auto compute) {
    using T = decltype(compute);
    const auto rows = call.rows<decltype(storage), T>();
    std::vector<T> losses(call.N);
    std::vector<char> counts(call.N);
    call.for_rows([&](int64_t begin, int64_t end) {
      UPS_ISA_CALL(multilabel_rows, rows, losses.data(), counts.data(), begin, end);
    });
    double sum = 0, weights = 0;  // in row order, whatever the number of threads
    for (int64_t i = 0; i < call.N; ++i) {
      const T w = counts[i] ? rows.weight ? rows.weight[i] : T(1) : T(0);
      if (counts[i]) losses[i] *= w;
      sum += losses[i];
      weights += w;
    }
    const double divisor = divisor_of(reduction, call.N);
    const double of_image = 1 / (divisor != 0 ? divisor : weights != 0 ? weights : 1);
    *data<T>(scale) = static_cast<T>(of_image);
    if (each) {
      std::copy(losses.begin(), losses.end(), data<T>(loss));
    } else {
      *data<T>(loss) = static_cast<T>(of_image * sum);
    }
  });
  return {loss, scale};
}

Tensor ups_loss_multilabel_backward_cpu(const Tensor& d_loss, const Tensor& logits, const Tensor& positive,
                                        const Tensor& negative, const Tensor& scale, std::optional<Tensor> weight) {
  const MultilabelCall call(logits, positive, negative, weight);
  check_gradient(d_loss, scale, 1, logits);
  const Tensor d_logits = torch::stable::new_empty(logits, {call.N, call.C});
  const int64_t d_stride = d_loss.dim() == 0 ? 0 : d_loss.stride(0);
  dispatch_logits(logits, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const auto rows = call.rows<S, T>();
    const T* const from = data<const T>(d_loss);
    const T of_image = *data<const T>(scale);
    call.for_rows([&](int64_t begin, int64_t end) {
      UPS_ISA_CALL(d_multilabel_rows, rows, from, d_stride, of_image, data<S>(d_logits), begin, end);
    });
  });
  return d_logits;
}

}  // namespace
}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) {
  m.impl("ups_loss_multilabel", TORCH_BOX(&ups::ups_loss_multilabel_cpu));
  m.impl("ups_loss_multilabel_backward", TORCH_BOX(&ups::ups_loss_multilabel_backward_cpu));
}
