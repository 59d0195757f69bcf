// mish and its backward on the CPU, elementwise in float32 (float64 for float64).
//
// Never materialized: anything but the result; the backward computes the exponential again from x.
#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../math/common.h"
#include "../mish_call.h"
#include "isa.h"

namespace ups {

using c10::BFloat16;
using c10::Half;

template <class Storage, class Compute>
struct MishArgs {
  const Storage* x;    // [elements]
  const Storage* d_y;  // [elements]; null: the value itself is asked for
  Storage* y;          // [elements], the value, or the gradient
};

}  // namespace ups

#define UPS_ISA_SOURCE "mish.inl"
#include "each_isa.h"

namespace ups {
namespace {

constexpr int64_t kGrain = 16384;

void run(const MishCall& call, const Tensor* d_y) {
  dispatch_logits(call.x, [&](auto storage, auto compute) {
    using S = decltype(storage);
    const MishArgs<S, decltype(compute)> args = {data<const S>(call.x), d_y ? data<const S>(*d_y) : nullptr,
                                                 data<S>(call.y)};
    torch::stable::parallel_for(0, call.elements, kGrain,
                                [&](int64_t begin, int64_t end) { UPS_ISA_CALL(mish_elements, args, begin, end); });
  });
}

Tensor mish_cpu(const Tensor& x) {
  const MishCall call(x);
  run(call, nullptr);
  return call.y;
}

Tensor mish_backward_cpu(const Tensor& d_y, const Tensor& x) {
  const MishBackwardCall call(d_y, x);
  run(call, &call.d_y);
  return call.y;
}

}  // namespace
}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) {
  m.impl("mish", TORCH_BOX(&ups::mish_cpu));
  m.impl("mish_backward", TORCH_BOX(&ups::mish_backward_cpu));
}
