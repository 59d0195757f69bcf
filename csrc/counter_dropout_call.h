// The checked arguments of counter_dropout, for the launchers of both backends.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace ups {

struct DropoutCall {
  DropoutCall(const Tensor& x_in, const Tensor& keys_in, double p, int64_t layer)
      : x(plain(x_in)), keys(torch::stable::contiguous(keys_in)), y(new_elementwise(x)), given(x_in) {
    UPS_CHECK(x.dim() >= 2, "x must have at least 2 dimensions, got ", x.dim());
    check_dim("keys", keys, 1);
    check_size("keys", keys, 0, x.size(0));
    check_type("keys", keys, ScalarType::Int, "int32");
    UPS_CHECK(p >= 0 && p < 1, "p must lie in [0, 1), got ", p);
    UPS_CHECK(layer >= 0 && layer < 1 << 20, "layer must lie in 0..2^20 - 1, got ", layer);
    rows = x.size(0);
    C = x.size(1);
    S = rows && C ? x.numel() / (rows * C) : 0;
    UPS_CHECK(C * S < int64_t{1} << 32, "x must have less than 2^32 elements in a row, got ", C * S);
    channels_last = C == 1 || S == 1 || x.stride(1) == 1;
    threshold = static_cast<uint32_t>(std::min(p * 4294967296.0, 4294967295.0));
    scale = 1 / (1 - p);
    layer_number = static_cast<uint32_t>(layer);
  }

  // y in the layout of the x that was given.
  Tensor result() const {
    if (is_contiguous(given) || is_channels_last(given)) return y;
    Tensor moved = new_elementwise(given);
    return torch::stable::copy_(moved, y);
  }

  const Tensor x, keys, y, given;  // x and y are contiguous or channels last
  int64_t rows, C, S;
  bool channels_last;
  uint32_t threshold, layer_number;
  double scale;
};

}  // namespace ups
