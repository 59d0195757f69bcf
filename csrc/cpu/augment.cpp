// augment and augment_plan on the CPU: uint8 images in, gathered, augmented as math/pixels.inl says and normalized.
//
// Never materialized: the gathered or the augmented bytes of a batch. A thread works through its images one by one,
// with two copies of one in its cache.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../augment_call.h"
#include "isa.h"
#include "scratch.h"

#define UPS_ISA_SOURCE "augment.inl"
#include "each_isa.h"

namespace ups {

template <class Word>
void check_rows(const AugmentArgs<Word>& args, int64_t B) {
  for (int64_t b = 0; b < B; ++b) {
    UPS_CHECK(args.index[b] >= 0 && args.index[b] < args.N, "index must lie in 0..", args.N - 1, ", got ",
              args.index[b]);
    UPS_CHECK(args.plan == nullptr || baseline::plan_fits(args, args.plan + b * plan_words(args.settings.n_ops)),
              "plan: row ", b, " holds what augment_plan would not draw for images of ", args.H, "x", args.W);
  }
}

void augment_cpu(const Tensor& out, const Tensor& images, const Tensor& index, const Tensor& variants,
                 const Tensor& operations, const Tensor& blends, const Tensor& norm, const Tensor& seed,
                 const Tensor& draw_number, std::optional<Tensor> plan, std::vector<int64_t> settings) {
  const AugmentCall call(out, images, index, variants, operations, blends, norm, seed, draw_number, plan, settings);
  call.dispatch([&](const auto& args, auto channels) {
    constexpr int C = decltype(channels)::value;
    check_rows(args, index.size(0));
    torch::stable::parallel_for(0, index.size(0), 8,
                                [&](int64_t begin, int64_t end) { UPS_ISA_CALL(augment_rows<C>, args, begin, end); });
  });
}

Tensor augment_plan_cpu(const Tensor& index, const Tensor& variants, const Tensor& operations, const Tensor& seed,
                        const Tensor& draw_number, int64_t H, int64_t W, std::vector<int64_t> settings) {
  const DrawArgs args = draw_args(index, variants, operations, seed, draw_number, H, W, settings);
  const Tensor plan = new_plan(index, args);
  torch::stable::parallel_for(0, index.size(0), 256, [&](int64_t begin, int64_t end) {
    UPS_ISA_CALL(draw_rows, args, data<int32_t>(plan), begin, end);
  });
  return plan;
}

}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) {
  m.impl("augment", TORCH_BOX(&ups::augment_cpu));
  m.impl("augment_plan", TORCH_BOX(&ups::augment_plan_cpu));
}
