// The launchers of counter_dropout and their registration; the device code is in counter_dropout.cuh.
#include "counter_dropout.cuh"

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
