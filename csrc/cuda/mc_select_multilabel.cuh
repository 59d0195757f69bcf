// mc_select_multilabel: the classes of each sample that surely are there, and that surely are not, from the logits of P
// stochastic passes [P, N, C]. Formulas in math/multilabel.inl.
//
// Per class: sigmoid at two temperatures in every pass, mean and M2 of both over the passes, thresholds. The logits are
// read once and only results are written: no probability of a pass exists in memory.
//
// Mapping: a thread has a class of a sample and keeps its four statistics in registers; neighbors have neighboring
// classes, so that loads and stores are consecutive. Where the masks are bits, a warp has the 32 classes of a word.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.cuh"
#include "loss.cuh"
#include "multilabel.cuh"
#include "plan.h"
#include "team.cuh"

namespace ups::cuda {
namespace {

template <class T>
struct MultilabelArgs {
  const T* logits;      // [P, N, C], classes contiguous
  int64_t pass_stride;  // in elements
  int64_t row_stride;
  int passes;      // P
  int64_t rows;    // N
  int classes;     // C
  bool temp_is_2;  // temp_nl == 2
  Thresholds<Acc<T>> limits;
  const Acc<T>* of_class;   // [4, C]: tau_p, tau_n, kappa_p, kappa_n; or null, then `limits` hold
  Acc<T>* confidence;       // [N, C]
  Acc<T>* deviation;        // [N, C]
  bool* positive;           // [N, C], or null:
  bool* negative;           // [N, C]
  unsigned* positive_bits;  // [N, ceil(C / 32)]
  unsigned* negative_bits;  // [N, ceil(C / 32)]
};

// exp(x * scale) for x <= 0 < scale.
__device__ __forceinline__ float exp_scaled(float x, float scale) { return fast_exp2(x, 1.44269504f * scale); }
__device__ __forceinline__ double exp_scaled(double x, double scale) { return std::exp(x * scale); }

__device__ __forceinline__ float inverse_of(float x) { return fast_inverse(x); }  // x >= 1
__device__ __forceinline__ double inverse_of(double x) { return 1 / x; }

template <class A>
struct SigmoidStats {
  A mean_p = 0;
  A m2_p = 0;
  A mean_q = 0;
  A m2_q = 0;
  A poison = 0;  // stays 0 while all logits are finite: 0 * NaN and 0 * inf are NaN

  __device__ __forceinline__ void add(A z, int pass, bool temp_is_2, A inv_temp) {
    poison += 0 * z;
    const A size = minus_size(z);
    const A e_q = exp_scaled(size, temp_is_2 ? A(0.5) : inv_temp);
    const A e_p = temp_is_2 ? e_q * e_q : exp_scaled(size, A(1));
    const A inv_k = inverse_of(static_cast<A>(pass + 1));
    welford(mean_p, m2_p, sigmoid_of(z, e_p, inverse_of(1 + e_p)), inv_k);
    welford(mean_q, m2_q, sigmoid_of(z, e_q, inverse_of(1 + e_q)), inv_k);
  }
};

template <class T>
__device__ __forceinline__ Thresholds<Acc<T>> limits_of(const MultilabelArgs<T>& a, int c) {
  if (a.of_class == nullptr) return a.limits;
  const Acc<T>* const of = a.of_class + c;
  const int64_t C = a.classes;
  return {of[0], of[C], m2_limit_of(of[2 * C], a.passes), m2_limit_of(of[3 * C], a.passes), a.limits.inv_temp};
}

template <class T, bool kPacked>
__global__ void __launch_bounds__(256) mc_select_multilabel_classes(const MultilabelArgs<T> a) {
  using A = Acc<T>;
  const int words = (a.classes + 31) / 32;
  const int64_t width = kPacked ? int64_t{words} * 32 : a.classes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  Team<32> warp;
  // A warp begins and ends as one where masks are packed: its first item and their number are multiples of 32.
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.rows * width; i += step) {
    const int64_t row = i / width;
    const int c = static_cast<int>(i - row * width);
    bool positive = false, negative = false;
    if (c < a.classes) {
      const T* from = a.logits + row * a.row_stride + c;
      SigmoidStats<A> stats;
#pragma unroll 5
      for (int pass = 0; pass < a.passes; ++pass) {
        stats.add(to_acc(__ldg(from + pass * a.pass_stride)), pass, a.temp_is_2, a.limits.inv_temp);
      }
      const Thresholds<A> limits = limits_of(a, c);
      const bool finite = stats.poison == 0;
      positive = finite && stats.mean_p >= limits.tau_p && stats.m2_p < limits.limit_p;
      negative = finite && stats.mean_q < limits.tau_n && stats.m2_q < limits.limit_n;
      a.confidence[row * a.classes + c] = finite ? stats.mean_p : A(NAN);
      a.deviation[row * a.classes + c] = finite ? std_of(stats.m2_p, a.passes) : A(NAN);
    }
    if constexpr (kPacked) {
      const unsigned bit = 1u << (c % 32);
      const unsigned is = warp.reduce(positive ? bit : 0u, BitOr{}), is_not = warp.reduce(negative ? bit : 0u, BitOr{});
      if (warp.lane() == 0) {
        a.positive_bits[row * words + c / 32] = is;
        a.negative_bits[row * words + c / 32] = is_not;
      }
    } else {
      a.positive[i] = positive;
      a.negative[i] = negative;
    }
  }
}

// thresholds: tau_p, tau_n, kappa_p, kappa_n, temp_nl. The masks are bool [N, C], or int32 [N, ceil(C / 32)] if packed.
template <class T>
MultilabelArgs<T> multilabel_args(const T* logits, int64_t pass_stride, int64_t row_stride, int64_t passes,
                                  int64_t rows, int64_t classes, const double (&thresholds)[5], const Acc<T>* of_class,
                                  Acc<T>* confidence, Acc<T>* deviation, void* positive, void* negative, bool packed) {
  const auto& [tau_p, tau_n, kappa_p, kappa_n, temp_nl] = thresholds;
  return {logits,
          pass_stride,
          row_stride,
          static_cast<int>(passes),
          rows,
          static_cast<int>(classes),
          temp_nl == 2.0,
          make_thresholds<Acc<T>>(tau_p, tau_n, kappa_p, kappa_n, temp_nl, passes),
          of_class,
          confidence,
          deviation,
          packed ? nullptr : static_cast<bool*>(positive),
          packed ? nullptr : static_cast<bool*>(negative),
          packed ? static_cast<unsigned*>(positive) : nullptr,
          packed ? static_cast<unsigned*>(negative) : nullptr};
}

template <class T>
auto multilabel_kernel(bool packed) -> void (*)(MultilabelArgs<T>) {
  return packed ? mc_select_multilabel_classes<T, true> : mc_select_multilabel_classes<T, false>;
}

}  // namespace
}  // namespace ups::cuda
