// The checked arguments of augment and augment_plan, for the launchers of both backends.
#pragma once

#include <cstring>
#include <optional>
#include <vector>

#include "augment.h"
#include "tensors.h"

namespace ups {

inline AugmentSettings settings_of(const std::vector<int64_t>& words) {
  UPS_CHECK(words.size() == kSettings, "settings must have ", kSettings, " values, got ", words.size());
  int32_t narrow[kSettings];
  for (int i = 0; i < kSettings; ++i) {
    UPS_CHECK(words[i] >= 0 && words[i] < 1 << 16, "settings must lie in 0..65535, got ", words[i]);
    narrow[i] = static_cast<int32_t>(words[i]);
  }
  AugmentSettings settings;
  std::memcpy(&settings, narrow, sizeof settings);
  for (int i = 0; i < 3; ++i) {
    UPS_CHECK(settings.low[i] <= settings.high[i], "settings must have low <= high for each jitter factor");
  }
  return settings;
}

inline DrawArgs draw_args(const Tensor& index, const Tensor& variants, const Tensor& operations, const Tensor& seed,
                          const Tensor& draw_number, int64_t H, int64_t W, const std::vector<int64_t>& settings) {
  check_dim("index", index, 1);
  check_type("index", index, ScalarType::Long, "int64");
  check_dim("variants", variants, 2);
  check_size("variants", variants, 1, sizeof(Variant) / sizeof(int32_t));
  check_type("variants", variants, ScalarType::Int, "int32");
  check_dim("operations", operations, 2);
  check_size("operations", operations, 1, 2);
  check_type("operations", operations, ScalarType::Int, "int32");
  check_dim("seed", seed, 0);
  check_type("seed", seed, ScalarType::Long, "int64");
  check_type("draw", draw_number, ScalarType::Long, "int64");
  const bool each = draw_number.dim() != 0;
  if (each) {
    check_dim("draw", draw_number, 1);
    check_size("draw", draw_number, 0, index.size(0));
  }
  for (const Tensor* x : {&variants, &operations, &index}) {
    UPS_CHECK(x->is_contiguous(), "index, variants and operations must be contiguous");
  }
  const DrawArgs args = {data<const int64_t>(index),
                         data<const Variant>(variants),
                         static_cast<int>(variants.size(0)),
                         data<const int32_t>(operations),
                         static_cast<int>(operations.size(0)),
                         data<const int64_t>(seed),
                         data<const int64_t>(draw_number),
                         each ? draw_number.stride(0) : 0,
                         static_cast<int>(H),
                         static_cast<int>(W),
                         settings_of(settings)};
  UPS_CHECK(H >= 1 && W >= 1 && H <= kMaxSide && W <= kMaxSide, "images must be 1 to ", kMaxSide,
            " pixels wide and high, got ", H, "x", W);
  UPS_CHECK(args.settings.n_ops == 0 || args.n_operations > 0, "operations must not be empty where n_ops is above 0");
  UPS_CHECK(args.settings.crop < H && args.settings.crop < W, "crop must be below the image size ", H, "x", W, ", got ",
            args.settings.crop);
  return args;
}

inline Tensor new_plan(const Tensor& index, const DrawArgs& args) {
  return torch::stable::new_empty(index, {index.size(0), plan_words(args.settings.n_ops)}, ScalarType::Int);
}

// The arguments of augment; `out` is [B, H, W, C] as `norm` is typed.
struct AugmentCall {
  AugmentCall(const Tensor& out, const Tensor& images, const Tensor& index, const Tensor& variants,
              const Tensor& operations, const Tensor& blends, const Tensor& norm, const Tensor& seed,
              const Tensor& draw_number, const std::optional<Tensor>& plan, const std::vector<int64_t>& settings)
      : images(images), blends(blends), norm(norm), out(out), plan(plan) {
    check_dim("images", images, 4);
    check_type("images", images, ScalarType::Byte, "uint8");
    draw = draw_args(index, variants, operations, seed, draw_number, images.size(1), images.size(2), settings);
    C = images.size(3);
    UPS_CHECK(C == 1 || C == 3, "images must have 1 or 3 channels, got ", C);
    check_dim("blends", blends, 3);
    check_size("blends", blends, 1, 256);
    check_size("blends", blends, 2, 256);
    check_type("blends", blends, ScalarType::Byte, "uint8");
    check_dim("norm", norm, 2);
    check_size("norm", norm, 0, C);
    check_size("norm", norm, 1, 256);
    const ScalarType type = norm.scalar_type();
    UPS_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
              "norm must be float32, float16 or bfloat16, got another dtype");
    check_dim("out", out, 4);
    check_size("out", out, 0, index.size(0));
    for (int axis = 1; axis < 4; ++axis) check_size("out", out, axis, images.size(axis));
    UPS_CHECK(out.scalar_type() == type, "out must have the dtype of norm");
    UPS_CHECK(images.is_contiguous() && blends.is_contiguous() && norm.is_contiguous() && out.is_contiguous(),
              "images, blends, norm and out must be contiguous");
    if (plan.has_value()) {
      check_dim("plan", *plan, 2);
      check_size("plan", *plan, 0, index.size(0));
      check_size("plan", *plan, 1, plan_words(draw.settings.n_ops));
      check_type("plan", *plan, ScalarType::Int, "int32");
      UPS_CHECK(plan->is_contiguous(), "plan must be contiguous");
    }
  }

  template <class Word>
  AugmentArgs<Word> args() const {
    return {draw,
            data<const uint8_t>(images),
            images.size(0),
            data<const uint8_t>(blends),
            data<const Word>(norm),
            plan.has_value() ? data<const int32_t>(*plan) : nullptr,
            data<Word>(out)};
  }

  // f(args, channels) with the types of this call.
  template <class F>
  void dispatch(const F& f) const {
    const auto typed = [&](auto word) {
      using Word = decltype(word);
      if (C == 1) return f(args<Word>(), std::integral_constant<int, 1>{});
      f(args<Word>(), std::integral_constant<int, 3>{});
    };
    if (norm.scalar_type() == ScalarType::Float) return typed(uint32_t{});
    typed(uint16_t{});
  }

  const Tensor images, blends, norm, out;
  const std::optional<Tensor> plan;
  DrawArgs draw;
  int64_t C;
};

}  // namespace ups
