// nce_loss on the CPU: the negative cross-entropy of the rows whose mask is not empty, and its gradient.
// Rows are shared out among threads; a row's classes lie in the lanes of SIMD vectors (loss_rows.inl).
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "loss_rows.h"

namespace ups {

static LossCall nce_call(const Tensor& logits, const Tensor& mask, const std::optional<Tensor>& weight) {
  check_dim("logits", logits, 2);
  return LossCall(dense_rows(logits), Mask("mask", mask, logits.size(0), logits.size(1)), weight);
}

std::tuple<Tensor, Tensor> nce_loss_cpu(const Tensor& logits, const Tensor& mask, int64_t reduction,
                                        std::optional<Tensor> weight) {
  return nce_call(logits, mask, weight).forward(reduction, {RowKind::negative});
}

Tensor nce_loss_backward_cpu(const Tensor& d_loss, const Tensor& logits, const Tensor& mask, const Tensor& scale,
                             std::optional<Tensor> weight) {
  return nce_call(logits, mask, weight).backward(d_loss, scale, {RowKind::negative});
}

}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) {
  m.impl("nce_loss", TORCH_BOX(&ups::nce_loss_cpu));
  m.impl("nce_loss_backward", TORCH_BOX(&ups::nce_loss_backward_cpu));
}
