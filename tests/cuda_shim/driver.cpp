// The kernels of csrc/cuda as C functions on host memory, one launch each as the real launchers would do it: the same
// plans, the same kernels. All return what went wrong, or "". Shapes and strides as in the kernels' own parameters.
#include <algorithm>
#include <string>
#include <vector>

#include "cuda_shim.h"

#include "../../csrc/cuda/augment.cuh"
#include "../../csrc/cuda/counter_dropout.cuh"
#include "../../csrc/cuda/fixmatch_loss.cuh"
#include "../../csrc/cuda/mc_select.cuh"
#include "../../csrc/cuda/mc_select_multilabel.cuh"
#include "../../csrc/cuda/mish.cuh"
#include "../../csrc/cuda/nce_loss.cuh"
#include "../../csrc/cuda/ups_loss.cuh"
#include "../../csrc/cuda/ups_loss_multilabel.cuh"

using namespace ups::cuda;

namespace {

std::string report;

// f(T{}) with the type of a dtype code: 0 float32, 1 float16, 2 bfloat16, 3 float64.
template <class F>
const char* with_type(int dtype, F f) {
  if (dtype == 0) report = f(float{});
  if (dtype == 1) report = f(__half{});
  if (dtype == 2) report = f(__nv_bfloat16{});
  if (dtype == 3) report = f(double{});
  return report.c_str();
}

template <class... Params, class... Args>
std::string launch(const LaunchPlan& plan, uint64_t seed, void (*kernel)(Params...), const Args&... args) {
  return shim::run_grid(plan.blocks, plan.threads, seed, [&] { kernel(args...); }, plan.shared);
}

// As LossLaunch of loss_launch.cuh; memory of exact size.
struct LossLaunch {
  uint64_t seed;
  std::string error;
  std::vector<char> kept;

  template <class Kernel, class... Args>
  void operator()(const LaunchPlan& plan, Kernel kernel, const Args&... args) {
    if (error.empty()) error = launch(plan, seed, kernel, args...);
  }
  void* memory(int64_t bytes) {
    kept.assign(bytes, static_cast<char>(0xff));
    return kept.data();
  }
};

ups::DrawArgs draw_args(const int64_t* index, const void* variants, int n_variants, const int32_t* operations,
                        int n_operations, const int64_t* seed_and_draw, int H, int W,
                        const ups::AugmentSettings& settings) {
  return {index,
          static_cast<const ups::Variant*>(variants),
          n_variants,
          operations,
          n_operations,
          seed_and_draw,
          seed_and_draw + 1,
          0,
          H,
          W,
          settings};
}

// The plan with fewer blocks, which then walk over more rows each: the losses allow that.
LaunchPlan at_most(int64_t max_blocks, LaunchPlan plan) {
  plan.blocks = std::min(max_blocks, plan.blocks);
  return plan;
}

}  // namespace

extern "C" {

// variant, threads per row, threads, blocks of op 0 mc_select, 1 a loss, 2 its backward
void launch_plan(int op, int64_t rows, int64_t classes, int64_t* plan) {
  const LaunchPlan p = op == 0   ? mc_select_plan(rows, classes)
                       : op == 1 ? loss_plan(rows, classes)
                                 : loss_backward_plan(rows, classes);
  plan[0] = p.variant, plan[1] = p.threads_per_row, plan[2] = p.threads, plan[3] = p.blocks;
}

// thresholds: tau_p, tau_n, kappa_p, kappa_n, temp_nl
const char* mc_select(uint64_t seed, int dtype, const void* logits, int64_t pass_stride, int64_t row_stride, int passes,
                      int64_t rows, int classes, const double* thresholds, int64_t* label, float* confidence,
                      float* deviation, bool* positive, void* negative, bool packed) {
  const LaunchPlan plan = mc_select_plan(rows, classes);
  return with_type(dtype, [&](auto zero) -> std::string {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double>) {
      return "mc_select has no float64 kernel";
    } else {
      const auto args =
          mc_select_args(plan, static_cast<const T*>(logits), pass_stride, row_stride, passes, rows, classes,
                         {thresholds[0], thresholds[1], thresholds[2], thresholds[3], thresholds[4]}, label, confidence,
                         deviation, positive, negative, packed);
      return launch(plan, seed, mc_select_kernel<T>(plan.variant), args);
    }
  });
}

// `weight` may be null here and in what follows.
const char* nce_loss(uint64_t seed, int64_t max_blocks, int dtype, const void* logits, int64_t row_stride, int64_t rows,
                     int classes, const void* mask, int64_t mask_stride, bool packed, const void* weight, int reduction,
                     void* loss, void* scale) {
  const LaunchPlan plan = at_most(max_blocks, loss_plan(rows, classes));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const NceRows<T> args = {static_cast<const T*>(logits), row_stride, rows, classes, {mask, mask_stride, packed},
                             static_cast<const A*>(weight)};
    LossLaunch launch = {seed, "", {}};
    launch_nce_loss(launch, plan, args, reduction, static_cast<A*>(loss), static_cast<A*>(scale));
    return launch.error;
  });
}

const char* nce_loss_backward(uint64_t seed, int64_t max_blocks, int dtype, const void* d_loss, int64_t d_loss_stride,
                              const void* logits, int64_t row_stride, int64_t rows, int classes, const void* mask,
                              int64_t mask_stride, bool packed, const void* weight, const void* scale, void* d_logits) {
  const LaunchPlan plan = at_most(max_blocks, loss_backward_plan(rows, classes));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const NceRows<T> args = {static_cast<const T*>(logits), row_stride, rows, classes, {mask, mask_stride, packed},
                             static_cast<const A*>(weight)};
    LossLaunch launch = {seed, "", {}};
    launch_nce_loss_backward(launch, plan, args, static_cast<const A*>(d_loss), d_loss_stride,
                             static_cast<const A*>(scale), static_cast<T*>(d_logits));
    return launch.error;
  });
}

// Of `target` and `soft` one is null; `negative` may be.
const char* ups_loss(uint64_t seed, int64_t max_blocks, int dtype, const void* logits, int64_t row_stride, int64_t rows,
                     int classes, const int64_t* target, const void* soft, int64_t soft_stride, double smoothing,
                     const bool* positive, const void* negative, int64_t negative_stride, bool packed,
                     const void* weight, int reduction, void* loss, void* scale) {
  const LaunchPlan plan = at_most(max_blocks, loss_plan(rows, classes));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto args = ups_rows<T>(static_cast<const T*>(logits), row_stride, rows, classes, target,
                                  static_cast<const A*>(soft), soft_stride, smoothing, positive,
                                  {negative, negative_stride, packed}, static_cast<const A*>(weight));
    LossLaunch launch = {seed, "", {}};
    launch_ups_loss(launch, plan, args, reduction, static_cast<A*>(loss), static_cast<A*>(scale));
    return launch.error;
  });
}

const char* ups_loss_backward(uint64_t seed, int64_t max_blocks, int dtype, const void* d_loss, int64_t d_loss_stride,
                              const void* logits, int64_t row_stride, int64_t rows, int classes, const int64_t* target,
                              const void* soft, int64_t soft_stride, double smoothing, const bool* positive,
                              const void* negative, int64_t negative_stride, bool packed, const void* weight,
                              const void* scale, void* d_logits) {
  const LaunchPlan plan = at_most(max_blocks, loss_backward_plan(rows, classes));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto args = ups_rows<T>(static_cast<const T*>(logits), row_stride, rows, classes, target,
                                  static_cast<const A*>(soft), soft_stride, smoothing, positive,
                                  {negative, negative_stride, packed}, static_cast<const A*>(weight));
    LossLaunch launch = {seed, "", {}};
    launch_ups_loss_backward(launch, plan, args, static_cast<const A*>(d_loss), d_loss_stride,
                             static_cast<const A*>(scale), static_cast<T*>(d_logits));
    return launch.error;
  });
}

// `class_tau` and `weight` may be null.
const char* fixmatch_loss(uint64_t seed, int64_t max_blocks, int dtype, const void* strong, int64_t strong_stride,
                          const void* weak, int64_t weak_stride, int64_t rows, int classes, const void* class_tau,
                          double tau, double temperature, const void* weight, int reduction, void* loss, bool* mask,
                          int64_t* target, void* scale) {
  const LaunchPlan plan = at_most(max_blocks, loss_plan(rows, classes));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const FixmatchRows<T> args = {static_cast<const T*>(strong),
                                  strong_stride,
                                  static_cast<const T*>(weak),
                                  weak_stride,
                                  rows,
                                  classes,
                                  static_cast<A>(1 / temperature),
                                  static_cast<A>(tau),
                                  static_cast<const A*>(class_tau),
                                  static_cast<const A*>(weight)};
    LossLaunch launch = {seed, "", {}};
    launch_fixmatch_loss(launch, plan, args, reduction, static_cast<A*>(loss), mask, target, static_cast<A*>(scale));
    return launch.error;
  });
}

const char* fixmatch_loss_backward(uint64_t seed, int64_t max_blocks, int dtype, const void* d_loss,
                                   int64_t d_loss_stride, const void* strong, int64_t strong_stride, int64_t rows,
                                   int classes, const int64_t* target, const void* scale, const void* weight,
                                   void* d_strong) {
  const LaunchPlan plan = at_most(max_blocks, loss_backward_plan(rows, classes));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    FixmatchRows<T> args = {};
    args.strong = static_cast<const T*>(strong);
    args.strong_stride = strong_stride;
    args.rows = rows;
    args.classes = classes;
    args.weight = static_cast<const A*>(weight);
    LossLaunch launch = {seed, "", {}};
    launch_fixmatch_loss_backward(launch, plan, args, target, static_cast<const A*>(d_loss), d_loss_stride,
                                  static_cast<const A*>(scale), static_cast<T*>(d_strong));
    return launch.error;
  });
}

// `of_class` may be null, and has the type of the results.
const char* mc_select_multilabel(uint64_t seed, int64_t max_blocks, int dtype, const void* logits, int64_t pass_stride,
                                 int64_t row_stride, int passes, int64_t rows, int classes, const double* thresholds,
                                 const void* of_class, void* confidence, void* deviation, void* positive,
                                 void* negative, bool packed) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto args = multilabel_args(static_cast<const T*>(logits), pass_stride, row_stride, passes, rows, classes,
                                      {thresholds[0], thresholds[1], thresholds[2], thresholds[3], thresholds[4]},
                                      static_cast<const A*>(of_class), static_cast<A*>(confidence),
                                      static_cast<A*>(deviation), positive, negative, packed);
    const LaunchPlan plan = at_most(max_blocks, mc_select_multilabel_plan(rows, classes, packed, args.width));
    return launch(plan, seed, multilabel_kernel<T>(packed, args.width), args);
  });
}

// Of `weight` and `entry_weight` one is null, or both.
const char* ups_loss_multilabel(uint64_t seed, int64_t max_blocks, int dtype, const void* logits, int64_t row_stride,
                                int64_t rows, int classes, const void* positive, int64_t positive_stride,
                                bool positive_packed, const void* negative, int64_t negative_stride,
                                bool negative_packed, const void* weight, const void* entry_weight,
                                int64_t entry_stride, int reduction, void* loss, void* scale) {
  const LaunchPlan plan = at_most(max_blocks, loss_plan(rows, classes));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const MultilabelRows<T> args = {static_cast<const T*>(logits),
                                    row_stride,
                                    rows,
                                    classes,
                                    {positive, positive_stride, positive_packed},
                                    {negative, negative_stride, negative_packed},
                                    static_cast<const A*>(weight),
                                    static_cast<const A*>(entry_weight),
                                    entry_stride};
    LossLaunch launch = {seed, "", {}};
    launch_ups_loss_multilabel(launch, plan, args, reduction, static_cast<A*>(loss), static_cast<A*>(scale));
    return launch.error;
  });
}

const char* ups_loss_multilabel_backward(uint64_t seed, int64_t max_blocks, int dtype, const void* d_loss,
                                         int64_t d_loss_stride, const void* logits, int64_t row_stride, int64_t rows,
                                         int classes, const void* positive, int64_t positive_stride,
                                         bool positive_packed, const void* negative, int64_t negative_stride,
                                         bool negative_packed, const void* weight, const void* entry_weight,
                                         int64_t entry_stride, const void* scale, void* d_logits) {
  const LaunchPlan plan = at_most(max_blocks, loss_backward_plan(rows, classes));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const MultilabelRows<T> args = {static_cast<const T*>(logits),
                                    row_stride,
                                    rows,
                                    classes,
                                    {positive, positive_stride, positive_packed},
                                    {negative, negative_stride, negative_packed},
                                    static_cast<const A*>(weight),
                                    static_cast<const A*>(entry_weight),
                                    entry_stride};
    LossLaunch launch = {seed, "", {}};
    launch_ups_loss_multilabel_backward(launch, plan, args, static_cast<const A*>(d_loss), d_loss_stride,
                                        static_cast<const A*>(scale), static_cast<T*>(d_logits));
    return launch.error;
  });
}

// As torch.ops.ups_fast.augment, to float32. `plan` may be null. In global memory where shared_bytes do not suffice.
const char* augment(uint64_t seed, int64_t shared_bytes, int64_t max_blocks, const uint8_t* images, int64_t N, int H,
                    int W, int C, const int64_t* index, int64_t B, const void* variants, int n_variants,
                    const int32_t* operations, int n_operations, const uint8_t* blends, const uint32_t* norm,
                    const int64_t* seed_and_draw, const int32_t* plan, const ups::AugmentSettings* settings,
                    uint32_t* out) {
  const ups::DrawArgs draw =
      draw_args(index, variants, n_variants, operations, n_operations, seed_and_draw, H, W, *settings);
  const ups::AugmentArgs<uint32_t> args = {draw, images, N, blends, norm, plan, out};
  const size_t bytes = ups::canvas_bytes(H, W, C, settings->n_ops).total;
  const LaunchPlan where = at_most(max_blocks, augment_plan(B, int64_t{H} * W, bytes, shared_bytes));
  std::vector<uint4> global(where.variant == 1 ? where.blocks * bytes / sizeof(uint4) : 0);
  uint8_t* const memory = reinterpret_cast<uint8_t*>(global.data());
  const auto run = [&](auto kernel) { report = launch(where, seed, kernel, args, B, memory); };
  if (where.variant == 1) {
    C == 1 ? run(augment_block<1, uint32_t, false>) : run(augment_block<3, uint32_t, false>);
  } else {
    C == 1 ? run(augment_block<1, uint32_t, true>) : run(augment_block<3, uint32_t, true>);
  }
  return report.c_str();
}

const char* augment_plan_draws(uint64_t seed, const int64_t* index, int64_t B, const void* variants, int n_variants,
                               const int32_t* operations, int n_operations, const int64_t* seed_and_draw, int H, int W,
                               const ups::AugmentSettings* settings, int32_t* plan) {
  const ups::DrawArgs draw =
      draw_args(index, variants, n_variants, operations, n_operations, seed_and_draw, H, W, *settings);
  report = launch(draw_plan(B), seed, augment_plan_rows, draw, B, plan);
  return report.c_str();
}

const char* counter_dropout(uint64_t seed, int64_t max_blocks, int dtype, const void* x, const int32_t* keys,
                            int64_t rows, int64_t C, int64_t S, bool channels_last, double p, int64_t layer, void* y) {
  const LaunchPlan plan = at_most(max_blocks, elementwise_plan(rows * C * S));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const DropoutArgs<T> args = {static_cast<const T*>(x),
                                 static_cast<T*>(y),
                                 keys,
                                 rows * C * S,
                                 static_cast<uint32_t>(C),
                                 static_cast<uint32_t>(S),
                                 channels_last,
                                 static_cast<uint32_t>(p * 4294967296.0),
                                 static_cast<uint32_t>(layer),
                                 1 / (1 - p)};
    return launch(plan, seed, counter_dropout_elements<T>, args);
  });
}

// d_y null: the value itself.
const char* mish(uint64_t seed, int64_t max_blocks, int dtype, const void* x, const void* d_y, int64_t elements,
                 void* y) {
  const LaunchPlan plan = at_most(max_blocks, elementwise_plan(elements));
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const MishArgs<T> args = {static_cast<const T*>(x), static_cast<const T*>(d_y), static_cast<T*>(y), elements};
    return launch(plan, seed, mish_elements<T>, args);
  });
}

}  // extern "C"
