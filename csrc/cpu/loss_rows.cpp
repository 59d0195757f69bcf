#include "loss_rows.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <torch/csrc/stable/ops.h>

#include "../loss_call.h"
#include "../math/loss_row.h"
#include "isa.h"
#include "scratch.h"

namespace ups {

using c10::BFloat16;
using c10::Half;

// What a kernel needs to know of the rows. Of `target` and `soft` one is null, or both without positive rows.
template <class S, class T>
struct LossRows {
  const S* logits;  // [N, C], rows dense
  int64_t stride;
  int64_t C;
  const RowKind* kind;    // [N]
  const int64_t* target;  // [N]
  const T* soft;          // [N, C], rows dense
  int64_t soft_stride;
  bool spread;   // the target of a row is not one class, but keep * target + even
  T keep, even;  // 1 - smoothing, smoothing / C
  const Mask& mask;
};

}  // namespace ups

#define UPS_ISA_SOURCE "loss_rows.inl"
#include "each_isa.h"

namespace ups {

// Element i of a contiguous compute_type tensor.
static double element(const Tensor& x, int64_t i) {
  return x.scalar_type() == ScalarType::Double ? data<const double>(x)[i] : data<const float>(x)[i];
}

bool MaskRow::any(int64_t n_classes) const {
  return bytes ? std::any_of(bytes, bytes + n_classes, [](uint8_t b) { return b != 0; })
               : words && std::any_of(words, words + (n_classes + 31) / 32, [](uint32_t w) { return w != 0; });
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

LossCall::LossCall(const Tensor& logits_in, Mask mask_in, const std::optional<Tensor>& weight_in,
                   std::optional<Targets> targets)
    : logits(logits_in),
      mask(std::move(mask_in)),
      weight(checked_weight(weight_in, logits)),
      target(targets ? checked_target(targets->target, logits) : Tensor()),
      smoothing(targets ? targets->smoothing : 0),
      N(logits.size(0)),
      C(logits.size(1)),
      kind(N) {
  const auto counts = [&](int64_t i) { return !weight.defined() || element(weight, i) != 0; };
  for (int64_t i = 0; i < N; ++i) kind[i] = mask.row(i).any(C) && counts(i) ? RowKind::negative : RowKind::none;
  if (!targets) return;
  const Tensor& positive = targets->positive;
  check_dim("positive", positive, 1);
  check_size("positive", positive, 0, N);
  check_type("positive", positive, ScalarType::Bool, "bool");
  const int64_t* const classes = target.dim() == 1 ? data<const int64_t>(target) : nullptr;
  for (int64_t i = 0; i < N; ++i) {
    if (!data<const bool>(positive)[i * positive.stride(0)]) continue;
    kind[i] = counts(i) ? RowKind::positive : RowKind::none;
    if (classes == nullptr || kind[i] == RowKind::none) continue;
    UPS_CHECK(classes[i] >= 0 && classes[i] < C, "target must lie in [0, ", C, ") in positive rows, got ", classes[i],
              " in row ", i);
  }
}

double LossCall::weight_of(int64_t i) const { return weight.defined() ? element(weight, i) : 1; }

template <class S, class T>
LossRows<S, T> LossCall::rows() const {
  const bool is_class = target.defined() && target.dim() == 1, is_soft = target.defined() && target.dim() == 2;
  return {data<const S>(logits),
          logits.stride(0),
          C,
          kind.data(),
          is_class ? data<const int64_t>(target) : nullptr,
          is_soft ? data<const T>(target) : nullptr,
          is_soft ? target.stride(0) : 0,
          is_soft || smoothing != 0,
          static_cast<T>(1 - smoothing),
          static_cast<T>(smoothing / static_cast<double>(C)),
          mask};
}

// Rows for one thread: enough work to be worth waking it.
static int64_t grain(int64_t n_classes) { return 1 + 16384 / n_classes; }

Tensor LossCall::losses() const {
  Tensor losses = torch::stable::new_empty(logits, {N}, compute_type(logits));
  dispatch_logits(logits, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const LossRows<S, T> all = rows<S, T>();
    torch::stable::parallel_for(
        0, N, grain(C), [&](int64_t begin, int64_t end) { UPS_ISA_CALL(loss_rows, all, data<T>(losses), begin, end); });
  });
  return losses;
}

// A compute_type tensor on the logits' device of these values.
static Tensor new_values(const Tensor& logits, const std::vector<double>& values) {
  const int64_t n = static_cast<int64_t>(values.size());
  Tensor result = n == 1 ? torch::stable::new_empty(logits, {}, compute_type(logits))
                         : torch::stable::new_empty(logits, {n}, compute_type(logits));
  if (compute_type(logits) == ScalarType::Double) {
    std::copy(values.begin(), values.end(), data<double>(result));
  } else {
    std::copy(values.begin(), values.end(), data<float>(result));
  }
  return result;
}

std::tuple<Tensor, Tensor> LossCall::forward(int64_t reduction, std::initializer_list<RowKind> kinds) const {
  Tensor each = losses();
  double loss = 0;
  std::vector<double> scales;
  for (const RowKind which : kinds) {
    double sum = 0, weights = 0;  // in row order, whatever the number of threads
    for (int64_t i = 0; i < N; ++i) {
      if (kind[i] != which) continue;
      sum += weight_of(i) * element(each, i);
      weights += weight_of(i);
    }
    const double divisor = divisor_of(reduction, N);
    scales.push_back(1 / (divisor != 0 ? divisor : weights != 0 ? weights : 1));
    loss += scales.back() * sum;
  }
  if (reduction != kNone) return {new_values(logits, {loss}), new_values(logits, scales)};
  for (int64_t i = 0; weight.defined() && i < N; ++i) {
    if (kind[i] == RowKind::none) continue;
    if (compute_type(logits) == ScalarType::Double) {
      data<double>(each)[i] *= data<const double>(weight)[i];
    } else {
      data<float>(each)[i] *= data<const float>(weight)[i];
    }
  }
  return {each, new_values(logits, scales)};
}

Tensor LossCall::backward(const Tensor& d_loss, const Tensor& scale, std::initializer_list<RowKind> kinds) const {
  check_gradient(d_loss, scale, static_cast<int64_t>(kinds.size()), logits);
  double scale_of[3] = {};  // by RowKind
  for (size_t i = 0; i < kinds.size(); ++i) {
    scale_of[static_cast<size_t>(kinds.begin()[i])] = element(scale, static_cast<int64_t>(i));
  }
  Tensor result = torch::stable::new_empty(logits, {N, C});
  dispatch_logits(logits, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const LossRows<S, T> all = rows<S, T>();
    const int64_t d_stride = d_loss.dim() == 0 ? 0 : d_loss.stride(0);
    std::vector<T> factor(N);
    for (int64_t i = 0; i < N; ++i) {
      const double group_scale = scale_of[static_cast<size_t>(kind[i])];
      factor[i] = data<const T>(d_loss)[i * d_stride] * static_cast<T>(group_scale);
      if (weight.defined()) factor[i] *= data<const T>(weight)[i];
    }
    torch::stable::parallel_for(0, N, grain(C), [&](int64_t begin, int64_t end) {
      UPS_ISA_CALL(d_loss_rows, all, factor.data(), data<S>(result), begin, end);
    });
  });
  return result;
}

}  // namespace ups
