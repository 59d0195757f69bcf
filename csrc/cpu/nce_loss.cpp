// nce_loss on the CPU: the negative cross-entropy of the rows whose mask is not empty, and its gradient.
// Rows are shared out among threads; a row's classes lie in the lanes of SIMD vectors (loss_rows.inl).
#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "loss_rows.h"

namespace ups {

// reduction: 0 none, 1 mean over the rows with a mask, 2 sum
std::tuple<Tensor, Tensor> nce_loss_cpu(const Tensor& logits, const Tensor& mask, int64_t reduction) {
  check_dim("logits", logits, 2);
  const LossCall call(dense_rows(logits), Mask("mask", mask, logits.size(0), logits.size(1)));
  const double scale = reduction == 1 ? 1.0 / std::max<int64_t>(1, call.count(RowKind::negative)) : 1.0;
  const Tensor losses = call.losses();
  const Tensor loss = reduction == 0 ? losses : new_values(logits, {}, {scale * call.sum(losses, RowKind::negative)});
  return {loss, new_values(logits, {}, {scale})};
}

Tensor nce_loss_backward_cpu(const Tensor& d_loss, const Tensor& logits, const Tensor& mask, const Tensor& scale) {
  const LossCall call(dense_rows(logits), Mask("mask", mask, logits.size(0), logits.size(1)));
  return call.d_logits(d_loss, 0, element(scale, 0));
}

}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) {
  m.impl("nce_loss", TORCH_BOX(&ups::nce_loss_cpu));
  m.impl("nce_loss_backward", TORCH_BOX(&ups::nce_loss_backward_cpu));
}
