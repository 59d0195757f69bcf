// mish and its backward, elementwise in float32 (float64 for float64).
//
// Never materialized: anything but the result; the backward computes the exponential again from x. Mapping: a thread
// takes every so many elements of the flat memory, so that loads and stores are consecutive in any layout.
#include <cmath>
#include <cstdint>

#include "../math/common.h"
#include "element.cuh"
#include "plan.h"

namespace ups::cuda {
namespace {

#include "../math/mish.inl"

__device__ __forceinline__ float mish_range(float) { return 87.0f; }
__device__ __forceinline__ double mish_range(double) { return 700.0; }

struct ExpOf {
  template <class A>
  __device__ __forceinline__ A operator()(A x) const {
    return std::exp(x);
  }
};

template <class T>
struct MishArgs {
  const T* x;    // [elements]
  const T* d_y;  // [elements]; null: the value itself is asked for
  T* y;          // [elements], the value, or the gradient
  int64_t elements;
};

template <class T>
__global__ void __launch_bounds__(256) mish_elements(const MishArgs<T> a) {
  using A = decltype(to_acc(T{}));
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.elements; i += step) {
    const A x = to_acc(a.x[i]);
    const Mish<A> m = Mish<A>::of(x, mish_range(A{}), ExpOf{});
    store(a.y + i, a.d_y ? to_acc(a.d_y[i]) * m.slope(A{}) : m.value(x));
  }
}

}  // namespace
}  // namespace ups::cuda

#ifndef UPS_FAST_SHIM  // the rest needs torch
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
#endif
