// mish and its backward, elementwise in float32 (float64 for float64).
//
// Never materialized: anything but the result; the backward computes the exponential again from x. Mapping: a thread
// takes every so many elements of the flat memory, so that loads and stores are consecutive in any layout.
#pragma once

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
