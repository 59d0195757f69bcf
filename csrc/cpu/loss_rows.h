// What nce_loss and ups_loss share on the CPU: rows of logits, each with a cross-entropy, a negative cross-entropy or
// no loss at all. Formulas in math/loss_row.h.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "../tensors.h"

namespace ups {

enum class RowKind : uint8_t { none, positive, negative };

// The mask of one row: one of the two is null.
struct MaskRow {
  const uint8_t* bytes;   // [C], 0 or 1
  const uint32_t* words;  // [ceil(C / 32)]
  bool any(int64_t n_classes) const;
};

// bool [N, C] or packed int32 [N, ceil(C / 32)], rows dense.
struct Mask {
  Mask(const char* name, const Tensor& mask, int64_t n_rows, int64_t n_classes);
  MaskRow row(int64_t i) const {
    return packed ? MaskRow{nullptr, static_cast<const uint32_t*>(data) + i * stride}
                  : MaskRow{static_cast<const uint8_t*>(data) + i * stride, nullptr};
  }
  Tensor owner;
  bool packed;
  const void* data;
  int64_t stride;
};

// The rows of one call, and the kind of each.
class LossCall {
 public:
  // logits [N, C], rows dense; without `positive` (and `target`) every row with a mask is negative.
  LossCall(const Tensor& logits, Mask mask, const Tensor* target = nullptr, const Tensor* positive = nullptr);

  int64_t count(RowKind kind) const;

  // The loss of each row, compute_type [N]; 0 for RowKind::none.
  Tensor losses() const;

  // The gradient of each row's loss times its kind's scale and d_loss ([N] or a scalar): the logits' dtype, [N, C].
  Tensor d_logits(const Tensor& d_loss, double scale_positive, double scale_negative) const;

  // The sum of the losses of one kind, in row order whatever the number of threads.
  double sum(const Tensor& losses, RowKind kind) const;

 private:
  const Tensor logits;
  const Mask mask;
  const Tensor target;
  const int64_t N, C;
  std::vector<RowKind> kind;  // [N]
};

// Element i of a contiguous compute_type tensor.
double element(const Tensor& x, int64_t i);
// A compute_type tensor on the logits' device of these values.
Tensor new_values(const Tensor& logits, std::initializer_list<int64_t> shape, std::initializer_list<double> values);

}  // namespace ups
