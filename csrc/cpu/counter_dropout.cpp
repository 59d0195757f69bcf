// counter_dropout on the CPU: y = x / (1 - p) where an element is kept, 0 elsewhere; its own gradient, too.
//
// Never materialized: the mask, which is computed again wherever it is needed. Rows are shared out among threads.
#include <cstdint>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../counter_dropout_call.h"
#include "../math/common.h"
#include "isa.h"

namespace ups {

template <class Storage, class Compute>
struct DropoutArgs {
  const Storage* x;     // [rows, C, S] or, channels last, [rows, S, C]
  Storage* y;           // likewise
  const int32_t* keys;  // [rows]
  int64_t C, S;
  bool channels_last;
  uint32_t threshold, layer;
  Compute scale;
};

}  // namespace ups

#define UPS_ISA_SOURCE "counter_dropout.inl"
#include "each_isa.h"

namespace ups {

Tensor counter_dropout_cpu(const Tensor& x, const Tensor& keys, double p, int64_t layer) {
  const DropoutCall call(x, keys, p, layer);
  const int64_t grain = 1 + 32768 / (call.C * call.S + 1);
  dispatch_logits(x, [&](auto storage, auto compute) {
    using S = decltype(storage);
    using T = decltype(compute);
    const DropoutArgs<S, T> args = {
        data<const S>(call.x), data<S>(call.y),   data<const int32_t>(call.keys), call.C, call.S, call.channels_last,
        call.threshold,        call.layer_number, static_cast<T>(call.scale)};
    torch::stable::parallel_for(0, call.rows, grain,
                                [&](int64_t begin, int64_t end) { UPS_ISA_CALL(dropout_rows, args, begin, end); });
  });
  return call.result();
}

}  // namespace ups

STABLE_TORCH_LIBRARY_IMPL(ups_fast, CPU, m) { m.impl("counter_dropout", TORCH_BOX(&ups::counter_dropout_cpu)); }
