#include "loss_rows.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <torch/csrc/stable/ops.h>

#include "../math/loss_row.h"
#include "isa.h"
#include "scratch.h"

namespace ups {

using c10::BFloat16;
using c10::Half;

// What a kernel needs to know of the rows.
template <class S, class T>
struct LossRows {
  const S* logits;  // [N, C], rows dense
  int64_t stride;
  int64_t C;
  const RowKind* kind;    // [N]
  const int64_t* target;  // [N]
  const Mask& mask;
};

}  // namespace ups

#define UPS_ISA_SOURCE "loss_rows.inl"
#include "each_isa.h"

namespace ups {

bool MaskRow::any(int64_t n_classes) const {
  return bytes ? std::any_of(bytes, bytes + n_classes, [](uint8_t b) { return b != 0; })
               : std::any_of(words, words + (n_classes + 31) / 32, [](uint32_t w) { return w != 0; });
}

Mask::Mask(const char* name, const Tensor& mask, int64_t n_rows, int64_t n_classes)
    : owner((check_dim(name, mask, 2), dense_rows(mask))),
      packed(mask.scalar_type() == ScalarType::Int),
      data(owner.data_ptr()),
      stride(owner.stride(0)) {
  UPS_CHECK(packed || mask.scalar_type() == ScalarType::Bool, name, " must be bool or packed int32");
  check_size(name, mask, 0, n_rows);
  check_size(name, mask, 1, packed ? (n_classes + 31) / 32 : n_classes);
}

LossCall::LossCall(const Tensor& logits_in, Mask mask_in, const Tensor* target_in, const Tensor* positive_in)
    : logits(logits_in),
      mask(std::move(mask_in)),
      target(target_in ? torch::stable::contiguous(*target_in) : Tensor()),
      N(logits.size(0)),
      C(logits.size(1)),
      kind(N) {
  for (int64_t i = 0; i < N; ++i) kind[i] = mask.row(i).any(C) ? RowKind::negative : RowKind::none;
  if (!positive_in) return;
  const int64_t* const classes = data<const int64_t>(target);
  for (int64_t i = 0; i < N; ++i) {
    if (!data<const bool>(*positive_in)[i * positive_in->stride(0)]) continue;
    UPS_CHECK(classes[i] >= 0 && classes[i] < C, "target must lie in [0, ", C, ") in positive rows, got ", classes[i],
              " in row ", i);
    kind[i] = RowKind::positive;
  }
}

int64_t LossCall::count(RowKind which) const { return std::count(kind.begin(), kind.end(), which); }

// Rows for one thread: enough work to be worth waking it.
static int64_t grain(int64_t n_classes) { return 1 + 16384 / n_classes; }

Tensor LossCall::losses() const {
  Tensor losses = torch::stable::new_empty(logits, {N}, compute_type(logits));
  dispatch_logits(logits, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const LossRows<S, T> rows{data<const S>(logits),
                              logits.stride(0),
                              C,
                              kind.data(),
                              target.defined() ? data<const int64_t>(target) : nullptr,
                              mask};
    torch::stable::parallel_for(0, N, grain(C), [&](int64_t begin, int64_t end) {
      UPS_ISA_CALL(loss_rows, rows, data<T>(losses), begin, end);
    });
  });
  return losses;
}

Tensor LossCall::d_logits(const Tensor& d_loss, double scale_positive, double scale_negative) const {
  Tensor result = torch::stable::new_empty(logits, {N, C});
  dispatch_logits(logits, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const LossRows<S, T> rows{data<const S>(logits),
                              logits.stride(0),
                              C,
                              kind.data(),
                              target.defined() ? data<const int64_t>(target) : nullptr,
                              mask};
    const int64_t d_stride = d_loss.dim() == 0 ? 0 : d_loss.stride(0);
    std::vector<T> weight(N);
    for (int64_t i = 0; i < N; ++i) {
      const double scale = kind[i] == RowKind::positive ? scale_positive : scale_negative;
      weight[i] = data<const T>(d_loss)[i * d_stride] * static_cast<T>(scale);
    }
    torch::stable::parallel_for(0, N, grain(C), [&](int64_t begin, int64_t end) {
      UPS_ISA_CALL(d_loss_rows, rows, weight.data(), data<S>(result), begin, end);
    });
  });
  return result;
}

double LossCall::sum(const Tensor& losses, RowKind which) const {
  double sum = 0;
  for (int64_t i = 0; i < N; ++i) {
    if (kind[i] == which) sum += element(losses, i);
  }
  return sum;
}

double element(const Tensor& x, int64_t i) {
  return x.scalar_type() == ScalarType::Double ? data<const double>(x)[i] : data<const float>(x)[i];
}

Tensor new_values(const Tensor& logits, std::initializer_list<int64_t> shape, std::initializer_list<double> values) {
  Tensor result = torch::stable::new_empty(logits, shape, compute_type(logits));
  if (compute_type(logits) == ScalarType::Double) {
    std::copy(values.begin(), values.end(), data<double>(result));
  } else {
    std::copy(values.begin(), values.end(), data<float>(result));
  }
  return result;
}

}  // namespace ups
