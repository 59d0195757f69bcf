// counter_dropout: y = x / (1 - p) where an element is kept, 0 elsewhere; its own gradient, too.
//
// Never materialized: the mask, which is computed again wherever it is needed. Mapping: a thread takes every so many
// elements of the flat memory, so that loads and stores are consecutive in either layout.
#include <cstdint>

#include "../math/common.h"
#include "element.cuh"
#include "plan.h"

namespace ups::cuda {
namespace {

#include "../math/counter_dropout.inl"

template <class T>
struct DropoutArgs {
  const T* x;           // [rows, C, S] or, channels last, [rows, S, C]
  T* y;                 // likewise
  const int32_t* keys;  // [rows]
  int64_t elements;     // rows * C * S
  uint32_t C, S;
  bool channels_last;
  uint32_t threshold, layer;
  double scale;
};

template <class T>
__global__ void __launch_bounds__(256) counter_dropout_elements(const DropoutArgs<T> a) {
  const uint32_t n = a.C * a.S;
  const auto scale = static_cast<decltype(to_acc(T{}))>(a.scale);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.elements; i += step) {
    const int64_t row = i / n;
    const auto within = static_cast<uint32_t>(i - row * n);
    const uint32_t element = a.channels_last ? within : within % a.S * a.C + within / a.S;
    const uint32_t key = layer_key(static_cast<uint32_t>(a.keys[row]), a.layer);
    if (is_kept(key, element, a.threshold)) {
      store(a.y + i, to_acc(a.x[i]) * scale);
    } else {
      store(a.y + i, decltype(scale + scale){0});
    }
  }
}

}  // namespace
}  // namespace ups::cuda

#ifndef UPS_FAST_SHIM  // the rest needs torch
#include "../counter_dropout_call.h"
#include "launch.cuh"

namespace ups::cuda {
namespace {

Tensor counter_dropout_cuda(const Tensor& x, const Tensor& keys, double p, int64_t layer) {
  const DropoutCall call(x, keys, p, layer);
  check_beside("keys", keys, x);
  const int64_t elements = call.rows * call.C * call.S;
  if (elements == 0) return call.result();
  const DeviceGuard guard(x.get_device_index());
  dispatch_logits(x, [&](auto storage, auto) {
    using T = DeviceType<decltype(storage)>;
    const DropoutArgs<T> args = {data<const T>(call.x),
                                 data<T>(call.y),
                                 data<const int32_t>(call.keys),
                                 elements,
                                 static_cast<uint32_t>(call.C),
                                 static_cast<uint32_t>(call.S),
                                 call.channels_last,
                                 call.threshold,
                                 call.layer_number,
                                 call.scale};
    launch("counter_dropout", counter_dropout_elements<T>, elementwise_plan(elements), x, args);
  });
  return call.result();
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) { m.impl("counter_dropout", TORCH_BOX(&ups::cuda::counter_dropout_cuda)); }
#endif
