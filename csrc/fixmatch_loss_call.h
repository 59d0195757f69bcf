// The checked arguments of fixmatch_loss and its backward, and what they return, for the launchers of both backends.
#pragma once

#include <initializer_list>
#include <optional>
#include <tuple>

#include "loss_call.h"
#include "math/loss_row.h"

namespace ups {

struct FixmatchCall {
  FixmatchCall(const Tensor& strong_in, const Tensor& weak_in, const std::optional<Tensor>& class_tau_in, double tau_in,
               double temperature, int64_t reduction, const std::optional<Tensor>& weight_in)
      : strong(checked_logits("strong", strong_in)),
        weak(checked_logits("weak", weak_in)),
        class_tau(checked_class_tau(class_tau_in, strong)),
        weight(checked_weight(weight_in, strong)),
        N(strong.size(0)),
        C(strong.size(1)),
        tau(tau_in),
        inv_temperature(1 / temperature),
        divisor(divisor_of(reduction, N)),
        each(reduction == kNone) {
    check_type("weak", weak, strong.scalar_type(), "of the dtype of strong");
    check_size("weak", weak, 0, N);
    check_size("weak", weak, 1, C);
    const auto values = [&](std::initializer_list<int64_t> shape) {
      return torch::stable::new_empty(strong, shape, compute_type(strong));
    };
    loss = each ? values({N}) : values({});
    scale = values({});
    mask = torch::stable::new_empty(strong, {N}, ScalarType::Bool);
    target = torch::stable::new_empty(strong, {N}, ScalarType::Long);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> result() const { return {loss, mask, target, scale}; }

  static Tensor checked_logits(const char* name, const Tensor& x) {
    check_dim(name, x, 2);
    UPS_CHECK(x.size(1) >= 1, name, " must have at least one class, got [", x.size(0), ", ", x.size(1), "]");
    return dense_rows(x);
  }
  static Tensor checked_class_tau(const std::optional<Tensor>& tau, const Tensor& strong) {
    if (!tau) return {};
    check_dim("tau", *tau, 1);
    check_size("tau", *tau, 0, strong.size(1));
    check_type("tau", *tau, compute_type(strong), "of the loss' dtype");
    return torch::stable::contiguous(*tau);
  }

  const Tensor strong, weak;  // [N, C], rows dense
  const Tensor class_tau;     // compute_type [C], or undefined: tau holds for every class
  const Tensor weight;        // compute_type [N], or undefined: all are 1
  const int64_t N, C;
  const double tau, inv_temperature;
  const double divisor;  // see divisor_of
  const bool each;       // the loss of each row is wanted, not their sum

  Tensor loss;    // compute_type [], or [N] if each
  Tensor mask;    // bool [N]: the pseudo-label is above its threshold
  Tensor target;  // int64 [N]: the pseudo-label of a row that counts, or -1
  Tensor scale;   // compute_type []: of a row in the loss
};

struct FixmatchBackwardCall {
  FixmatchBackwardCall(const Tensor& d_loss_in, const Tensor& strong_in, const Tensor& target_in,
                       const Tensor& scale_in, const std::optional<Tensor>& weight_in)
      : strong(FixmatchCall::checked_logits("strong", strong_in)),
        target(checked_target(target_in, strong)),
        weight(checked_weight(weight_in, strong)),
        d_loss(d_loss_in),
        scale(scale_in),
        N(strong.size(0)),
        C(strong.size(1)),
        d_loss_stride(d_loss.dim() == 0 ? 0 : d_loss.stride(0)),
        d_strong(torch::stable::new_empty(strong, {N, C})) {
    check_dim("target", target, 1);
    check_gradient(d_loss, scale, 1, strong);
  }

  const Tensor strong;         // [N, C], rows dense
  const Tensor target;         // int64 [N], -1 for rows that count for nothing
  const Tensor weight;         // compute_type [N], or undefined: all are 1
  const Tensor d_loss, scale;  // compute_type [], d_loss [N] too
  const int64_t N, C, d_loss_stride;
  const Tensor d_strong;  // [N, C]
};

}  // namespace ups
