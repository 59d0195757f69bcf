// Arguments that the losses share, checked, for the launchers of both backends.
#pragma once

#include <optional>

#include "tensors.h"

namespace ups {

// compute_type [N], or undefined if there is none.
inline Tensor checked_weight(const std::optional<Tensor>& weight, const Tensor& logits) {
  if (!weight) return {};
  check_dim("weight", *weight, 1);
  check_size("weight", *weight, 0, logits.size(0));
  check_type("weight", *weight, compute_type(logits), "of the loss' dtype");
  return torch::stable::contiguous(*weight);
}

// compute_type [N], or [N, C] with dense rows, or undefined if there is none.
inline Tensor checked_entry_weight(const std::optional<Tensor>& weight, const Tensor& logits) {
  if (!weight || weight->dim() != 2) return checked_weight(weight, logits);
  check_size("weight", *weight, 0, logits.size(0));
  check_size("weight", *weight, 1, logits.size(1));
  check_type("weight", *weight, compute_type(logits), "of the loss' dtype");
  return dense_rows(*weight);
}

// int64 [N], or compute_type [N, C] with dense rows.
inline Tensor checked_target(const Tensor& target, const Tensor& logits) {
  if (target.scalar_type() == ScalarType::Long) {
    check_dim("target", target, 1);
    check_size("target", target, 0, logits.size(0));
    return torch::stable::contiguous(target);
  }
  check_type("target", target, compute_type(logits), "int64 or of the loss' dtype");
  check_dim("target", target, 2);
  check_size("target", target, 0, logits.size(0));
  check_size("target", target, 1, logits.size(1));
  return dense_rows(target);
}

template <class A>
const A* data_or_null(const Tensor& x) {
  return x.defined() ? data<const A>(x) : nullptr;
}

}  // namespace ups
