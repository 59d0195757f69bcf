// What the launchers of the losses share: checks, outputs and how they launch.
#pragma once

#include <initializer_list>
#include <optional>

#include "../loss_call.h"
#include "launch.cuh"
#include "loss.cuh"

namespace ups::cuda {

inline Tensor checked_logits(const Tensor& logits) {
  check_dim("logits", logits, 2);
  UPS_CHECK(logits.size(1) >= 1 && logits.size(1) <= kMaxClasses, "logits must have 1 to ", kMaxClasses,
            " classes, got [", logits.size(0), ", ", logits.size(1), "]");
  return dense_rows(logits);
}

inline Tensor checked_mask(const char* name, const Tensor& mask, const Tensor& logits) {
  const bool packed = mask.scalar_type() == ScalarType::Int;
  check_dim(name, mask, 2);
  UPS_CHECK(packed || mask.scalar_type() == ScalarType::Bool, name, " must be bool or packed int32");
  check_size(name, mask, 0, logits.size(0));
  check_size(name, mask, 1, packed ? ceil_div(logits.size(1), 32) : logits.size(1));
  check_beside(name, mask, logits);
  return dense_rows(mask);
}

inline Tensor checked_rows(const char* name, const Tensor& x, ScalarType type, const char* type_name,
                           const Tensor& logits) {
  check_dim(name, x, 1);
  check_size(name, x, 0, logits.size(0));
  check_type(name, x, type, type_name);
  check_beside(name, x, logits);
  return torch::stable::contiguous(x);
}

inline void check_gradient_beside(const Tensor& d_loss, const Tensor& scale, int64_t groups, const Tensor& logits) {
  check_gradient(d_loss, scale, groups, logits);
  check_beside("d_loss", d_loss, logits);
  check_beside("scale", scale, logits);
}

// As the host's, and on the logits' device.
inline Tensor weight_beside(const std::optional<Tensor>& weight, const Tensor& logits) {
  if (weight) check_beside("weight", *weight, logits);
  return checked_weight(weight, logits);
}

inline Mask mask_of(const Tensor& checked) {
  if (!checked.defined()) return {nullptr, 0, false};
  return {checked.data_ptr(), checked.stride(0), checked.scalar_type() == ScalarType::Int};
}

inline Tensor new_losses(const Tensor& logits, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(logits, shape, compute_type(logits));
}

// Launches of one op on the current stream; see launch_loss.
class LossLaunch {
 public:
  LossLaunch(const char* op, const Tensor& on) : op_(op), on_(on) {}

  template <class Kernel, class... Args>
  void operator()(const LaunchPlan& plan, Kernel kernel, const Args&... args) const {
    launch(op_, kernel, plan, on_, args...);
  }

  void* memory(int64_t bytes) {
    kept_ = torch::stable::new_empty(on_, {ceil_div(bytes, sizeof(int64_t))}, ScalarType::Long);
    return kept_.data_ptr();
  }

 private:
  const char* const op_;
  const Tensor on_;
  Tensor kept_;
};

}  // namespace ups::cuda
