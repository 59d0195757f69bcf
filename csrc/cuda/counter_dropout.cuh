// counter_dropout: y = x / (1 - p) where an element is kept, 0 elsewhere; its own gradient, too.
//
// Never materialized: the mask, which is computed again wherever it is needed. Mapping: a thread takes every so many
// elements of the flat memory, so that loads and stores are consecutive in either layout.
#pragma once

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
