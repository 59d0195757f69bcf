// The launchers of mish and their registration; the device code is in mish.cuh.
#include "mish.cuh"

#include "../mish_call.h"
#include "launch.cuh"

namespace ups::cuda {
namespace {

void run(const MishCall& call, const Tensor* d_y) {
  if (call.elements == 0) return;
  const DeviceGuard guard(call.x.get_device_index());
  dispatch_logits(call.x, [&](auto storage, auto) {
    using T = DeviceType<decltype(storage)>;
    const MishArgs<T> args = {data<const T>(call.x), d_y ? data<const T>(*d_y) : nullptr, data<T>(call.y),
                              call.elements};
    launch("mish", mish_elements<T>, elementwise_plan(call.elements), call.x, args);
  });
}

Tensor mish_cuda(const Tensor& x) {
  const MishCall call(x);
  run(call, nullptr);
  return call.y;
}

Tensor mish_backward_cuda(const Tensor& d_y, const Tensor& x) {
  check_beside("d_y", d_y, x);
  const MishBackwardCall call(d_y, x);
  run(call, &call.d_y);
  return call.y;
}

}  // namespace
}  // namespace ups::cuda

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CUDA, m) {
  m.impl("mish", TORCH_BOX(&ups::cuda::mish_cuda));
  m.impl("mish_backward", TORCH_BOX(&ups::cuda::mish_backward_cuda));
}
