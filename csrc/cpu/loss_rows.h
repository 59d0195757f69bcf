// What nce_loss and ups_loss share on the CPU: rows of logits, each with a cross-entropy, a negative cross-entropy or
// no loss at all. Formulas in math/loss_row.h.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"

namespace ups {

enum class RowKind : uint8_t { none, positive, negative };

// The mask of one row: one of the two is null, or both where there is no mask.
struct MaskRow {
  const uint8_t* bytes;   // [C], 0 or 1
  const uint32_t* words;  // [ceil(C / 32)]
  bool any(int64_t n_classes) const;
};

// bool [N, C] or packed int32 [N, ceil(C / 32)], rows dense; or none, which is empty everywhere.
struct Mask {
  Mask() = default;
  Mask(const char* name, const Tensor& mask, int64_t n_rows, int64_t n_classes);
  MaskRow row(int64_t i) const {
    if (data == nullptr) return {nullptr, nullptr};
    return packed ? MaskRow{nullptr, static_cast<const uint32_t*>(data) + i * stride}
                  : MaskRow{static_cast<const uint8_t*>(data) + i * stride, nullptr};
  }
  Tensor owner;
  bool packed = false;
  const void* data = nullptr;
  int64_t stride = 0;
};

template <class S, class T>
struct LossRows;

// What is known of the positive rows.
struct Targets {
  Tensor target;    // int64 [N], or compute_type [N, C]
  Tensor positive;  // bool [N]
  double smoothing;
};

// The rows of one call, and the kind of each.
class LossCall {
 public:
  // logits [N, C], rows dense; without targets every row with a mask is negative. A weight of 0 makes it none.
  LossCall(const Tensor& logits, Mask mask, const std::optional<Tensor>& weight, std::optional<Targets> targets = {});

  // The loss, [N] or a scalar, and the scale of each of these kinds' rows in it: [], or [n] for n kinds.
  std::tuple<Tensor, Tensor> forward(int64_t reduction, std::initializer_list<RowKind> kinds) const;

  // The gradient of each row's loss times its weight, its kind's scale and d_loss ([N] or a scalar): the logits' dtype,
  // [N, C]. `kinds` and `scale` as in `forward`.
  Tensor backward(const Tensor& d_loss, const Tensor& scale, std::initializer_list<RowKind> kinds) const;

 private:
  template <class S, class T>
  LossRows<S, T> rows() const;
  Tensor losses() const;  // of each row without its weight, compute_type [N]; 0 for RowKind::none
  double weight_of(int64_t i) const;

  const Tensor logits;
  const Mask mask;
  const Tensor weight;  // compute_type [N], or undefined: all are 1
  const Tensor target;
  const double smoothing;
  const int64_t N, C;
  std::vector<RowKind> kind;  // [N]
};

}  // namespace ups
