// What the launchers of both backends share: checks, outputs and the dispatch on the logits' type. The public Python
// functions give the same errors earlier and at more length; these also guard a direct call of torch.ops.ups_fast.*.
#pragma once

#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Raises a RuntimeError of the message alone; torch's own check would put function, file and line before it.
#define UPS_CHECK(condition, ...)                \
  do {                                           \
    if (!(condition)) ::ups::raise(__VA_ARGS__); \
  } while (false)

namespace ups {

template <class Part>
void append(std::string& message, const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", part);
    message += text;
  } else if constexpr (std::is_arithmetic_v<Part>) {
    message += std::to_string(part);
  } else {
    message += part;
  }
}

// Without streams: where a compiler links its own libstdc++ into this module, they find the locale of another one in
// the process, and crash.
template <class... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::string message;
  (append(message, parts), ...);
  throw std::runtime_error(message);
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(const_cast<void*>(x.data_ptr()));
}

inline void check_dim(const char* name, const Tensor& x, int64_t dim) {
  UPS_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, got ", x.dim());
}
inline void check_size(const char* name, const Tensor& x, int64_t dim, int64_t size) {
  UPS_CHECK(x.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", x.size(dim));
}
inline void check_type(const char* name, const Tensor& x, ScalarType type, const char* type_name) {
  UPS_CHECK(x.scalar_type() == type, name, " must be ", type_name, ", got another dtype");
}

// Itself if the last dimension is dense (any other strides are fine), else a contiguous copy.
inline Tensor dense_rows(const Tensor& x) {
  const bool dense = x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1;
  return dense ? x : torch::stable::contiguous(x);
}

// Whether the elements lie without gaps when the dimensions are walked in this order, from the innermost; dimensions of
// one element lie anywhere.
template <class Order>
bool packed(const Tensor& x, const Order& order) {
  int64_t expected = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t d = order(i);
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline bool is_contiguous(const Tensor& x) {
  return x.numel() == 0 || packed(x, [&](int64_t i) { return x.dim() - 1 - i; });
}

// Channels, then the last dimension to the third, then rows.
inline bool is_channels_last(const Tensor& x) {
  return x.dim() >= 2 && packed(x, [&](int64_t i) { return i == 0 ? 1 : i == x.dim() - 1 ? 0 : x.dim() - i; });
}

// Whether there is any order of the dimensions in which the elements lie without gaps.
inline bool is_dense(const Tensor& x) {
  if (is_contiguous(x)) return true;
  for (int64_t walked = 1; walked < x.numel();) {
    int64_t next = -1;
    for (int64_t d = 0; d < x.dim(); ++d) {
      if (x.size(d) != 1 && x.stride(d) == walked) next = d;
    }
    if (next < 0) return false;
    walked *= x.size(next);
  }
  return true;
}

// Itself if it is dense, else a dense copy whose dimensions lie in the same order.
inline Tensor dense(const Tensor& x) {
  if (is_dense(x)) return x;
  Tensor copy = torch::stable::empty_like(x);
  return torch::stable::copy_(copy, x);
}

// Itself if it is contiguous or channels last, else a contiguous copy.
inline Tensor plain(const Tensor& x) {
  return is_contiguous(x) || is_channels_last(x) ? x : torch::stable::contiguous(x);
}

// Memory for the result of an elementwise op on x: strides as torch's own unary ops choose them. They differ from those
// of empty_like in dimensions of one element.
inline Tensor new_elementwise(const Tensor& x) {
  const int64_t d = x.dim();
  bool any_one = x.numel() == 0;
  for (int64_t i = 0; i < d; ++i) any_one = any_one || x.size(i) == 1;
  if (!any_one) return torch::stable::empty_like(x);  // the usual case, and the fastest call
  if (is_contiguous(x)) return torch::stable::new_empty(x, x.sizes());
  if (d != 4 || !is_channels_last(x)) return torch::stable::empty_like(x);
  const Tensor last = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3), x.size(1)});
  return torch::stable::transpose(torch::stable::transpose(last, 1, 3), 2, 3);
}

// float32 statistics for all but float64 logits.
inline ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What comes back to a loss of logits [N, C]: d_loss [], or [N] with any stride; and the scale of each group of rows.
inline void check_gradient(const Tensor& d_loss, const Tensor& scale, int64_t groups, const Tensor& logits) {
  check_type("d_loss", d_loss, compute_type(logits), "of the loss' dtype");
  check_type("scale", scale, compute_type(logits), "of the loss' dtype");
  UPS_CHECK(scale.numel() == groups && is_contiguous(scale), "scale must have ", groups, " elements, got ",
            scale.numel());
  if (d_loss.dim() == 0) return;
  check_dim("d_loss", d_loss, 1);
  check_size("d_loss", d_loss, 0, logits.size(0));
}

// f(S{}, T{}) with the logits' storage type S and the type T to compute in.
template <class F>
void dispatch_logits(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Half:
      return f(c10::Half{}, float{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{}, float{});
    default:
      UPS_CHECK(false, "logits must be float32, float16, bfloat16 or float64, got another dtype");
  }
}

// The five outputs of mc_select for logits [P, N, C], uninitialized.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> new_selection(const Tensor& logits, bool packed) {
  const int64_t N = logits.size(1), C = logits.size(2);
  return {torch::stable::new_empty(logits, {N}, ScalarType::Long),
          torch::stable::new_empty(logits, {N}, compute_type(logits)),
          torch::stable::new_empty(logits, {N}, compute_type(logits)),
          torch::stable::new_empty(logits, {N}, ScalarType::Bool),
          packed ? torch::stable::new_empty(logits, {N, (C + 31) / 32}, ScalarType::Int)
                 : torch::stable::new_empty(logits, {N, C}, ScalarType::Bool)};
}

// compute_type [4, C], dense, or undefined: tau_p, tau_n, kappa_p and kappa_n of each class of logits [P, N, C].
inline Tensor checked_class_thresholds(const std::optional<Tensor>& thresholds, const Tensor& logits) {
  if (!thresholds) return {};
  check_dim("class_thresholds", *thresholds, 2);
  check_size("class_thresholds", *thresholds, 0, 4);
  check_size("class_thresholds", *thresholds, 1, logits.size(2));
  check_type("class_thresholds", *thresholds, compute_type(logits), "of the results' dtype");
  return torch::stable::contiguous(*thresholds);
}

// The four outputs of mc_select_multilabel for logits [P, N, C], uninitialized.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> new_multilabel_selection(const Tensor& logits, bool packed) {
  const int64_t N = logits.size(1), C = logits.size(2);
  const auto values = [&] { return torch::stable::new_empty(logits, {N, C}, compute_type(logits)); };
  const auto mask = [&] {
    return packed ? torch::stable::new_empty(logits, {N, (C + 31) / 32}, ScalarType::Int)
                  : torch::stable::new_empty(logits, {N, C}, ScalarType::Bool);
  };
  return {values(), values(), mask(), mask()};
}

}  // namespace ups
