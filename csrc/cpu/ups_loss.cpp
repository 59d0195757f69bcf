// ups_loss on the CPU: mean cross-entropy of the positive rows + mean negative cross-entropy of the negative ones, and
// its gradient. Rows are shared out among threads; a row's classes lie in the lanes of SIMD vectors (loss_rows.inl).
#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "loss_rows.h"

namespace ups {

static LossCall ups_call(const Tensor& logits, const Tensor& target, const Tensor& positive, const Tensor& negative) {
  const int64_t n_rows = logits.size(0);
  check_dim("target", target, 1);
  check_size("target", target, 0, n_rows);
  check_type("target", target, ScalarType::Long, "int64");
  check_dim("positive", positive, 1);
  check_size("positive", positive, 0, n_rows);
  check_type("positive", positive, ScalarType::Bool, "bool");
  return LossCall(dense_rows(logits), Mask("negative", negative, n_rows, logits.size(1)), &target, &positive);
}

std::tuple<Tensor, Tensor> ups_loss_cpu(const Tensor& logits, const Tensor& target, const Tensor& positive,
                                        const Tensor& negative) {
  check_dim("logits", logits, 2);
  const LossCall call = ups_call(logits, target, positive, negative);
  const double scale_p = 1.0 / std::max<int64_t>(1, call.count(RowKind::positive));
  const double scale_n = 1.0 / std::max<int64_t>(1, call.count(RowKind::negative));
  const Tensor losses = call.losses();
  const double loss = scale_p * call.sum(losses, RowKind::positive) + scale_n * call.sum(losses, RowKind::negative);
  return {new_values(logits, {}, {loss}), new_values(logits, {2}, {scale_p, scale_n})};
}

Tensor ups_loss_backward_cpu(const Tensor& d_loss, const Tensor& logits, const Tensor& target, const Tensor& positive,
                             const Tensor& negative, const Tensor& scale) {
  return ups_call(logits, target, positive, negative).d_logits(d_loss, element(scale, 0), element(scale, 1));
}

}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) {
  m.impl("ups_loss", TORCH_BOX(&ups::ups_loss_cpu));
  m.impl("ups_loss_backward", TORCH_BOX(&ups::ups_loss_backward_cpu));
}
