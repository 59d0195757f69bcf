// The checked arguments of mish and its backward, for the launchers of both backends.
#pragma once

#include "tensors.h"

namespace ups {

struct MishCall {
  explicit MishCall(const Tensor& x_in) : x(dense(x_in)), y(new_elementwise(x_in)), elements(x.numel()) {}

  const Tensor x, y;  // of one memory layout, without gaps; strides may differ in dimensions of one element
  const int64_t elements;
};

struct MishBackwardCall : MishCall {
  MishBackwardCall(const Tensor& d_y_in, const Tensor& x_in) : MishCall(x_in), d_y(like_x(d_y_in)) {}

  const Tensor d_y;  // in the layout of x

 private:
  Tensor like_x(const Tensor& d_y_in) const {
    bool fits = d_y_in.dim() == x.dim() && d_y_in.scalar_type() == x.scalar_type();
    for (int64_t d = 0; fits && d < x.dim(); ++d) fits = d_y_in.size(d) == x.size(d);
    UPS_CHECK(fits, "d_y must have the shape and dtype of x");
    bool same = true;
    for (int64_t d = 0; d < x.dim(); ++d) same = same && (x.size(d) == 1 || x.stride(d) == d_y_in.stride(d));
    if (same) return d_y_in;
    Tensor copy = torch::stable::empty_like(x);
    return torch::stable::copy_(copy, d_y_in);
  }
};

}  // namespace ups
