// ups_loss on the CPU: cross-entropy of the positive rows + negative cross-entropy of the negative ones, and the
// gradient. Rows are shared out among threads; a row's classes lie in the lanes of SIMD vectors (loss_rows.inl).
#include <optional>
#include <tuple>
#include <utility>

#include <torch/csrc/stable/library.h>

#include "loss_rows.h"

namespace ups {

static LossCall ups_call(const Tensor& logits, const Tensor& target, const Tensor& positive,
                         const std::optional<Tensor>& negative, const std::optional<Tensor>& weight, double smoothing) {
  check_dim("logits", logits, 2);
  Mask mask = negative ? Mask("negative", *negative, logits.size(0), logits.size(1)) : Mask();
  return LossCall(dense_rows(logits), std::move(mask), weight, Targets{target, positive, smoothing});
}

std::tuple<Tensor, Tensor> ups_loss_cpu(const Tensor& logits, const Tensor& target, const Tensor& positive,
                                        std::optional<Tensor> negative, int64_t reduction, std::optional<Tensor> weight,
                                        double smoothing) {
  const LossCall call = ups_call(logits, target, positive, negative, weight, smoothing);
  return call.forward(reduction, {RowKind::positive, RowKind::negative});
}

Tensor ups_loss_backward_cpu(const Tensor& d_loss, const Tensor& logits, const Tensor& target, const Tensor& positive,
                             std::optional<Tensor> negative, const Tensor& scale, std::optional<Tensor> weight,
                             double smoothing) {
  const LossCall call = ups_call(logits, target, positive, negative, weight, smoothing);
  return call.backward(d_loss, scale, {RowKind::positive, RowKind::negative});
}

}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) {
  m.impl("ups_loss", TORCH_BOX(&ups::ups_loss_cpu));
  m.impl("ups_loss_backward", TORCH_BOX(&ups::ups_loss_backward_cpu));
}
