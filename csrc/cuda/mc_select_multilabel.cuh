// mc_select_multilabel: the classes of each sample that surely are there, and that surely are not, from the logits of P
// stochastic passes [P, N, C]. Formulas in math/multilabel.inl.
//
// Per class: sigmoid at two temperatures in every pass, mean and M2 of both over the passes, thresholds. The logits are
// read once and only results are written: no probability of a pass exists in memory.
//
// Mapping: a thread has a chunk of neighboring classes of a sample, one load a pass, and keeps their statistics in
// registers; a chunk is a single class where rows do not lie on multiples of more. Where the masks are bits, 32 classes
// of neighboring threads make a word.
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
  int width;       // of a chunk: kMultilabelWidth<T> or 1
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

template <class T>
constexpr int kMultilabelWidth = sizeof(T) == 8 ? 2 : 4;

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

  __device__ __forceinline__ void add(A z, A inv_k, bool temp_is_2, A inv_temp) {
    poison += 0 * z;
    const A size = minus_size(z);
    const A e_q = exp_scaled(size, temp_is_2 ? A(0.5) : inv_temp);
    const A e_p = temp_is_2 ? e_q * e_q : exp_scaled(size, A(1));
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

template <class T, bool kPacked, int kWidth>
__global__ void __launch_bounds__(256) mc_select_multilabel_chunks(const MultilabelArgs<T> a) {
  using A = Acc<T>;
  const int words = (a.classes + 31) / 32;
  const unsigned chunks = static_cast<unsigned>(kPacked ? words * 32 : a.classes) / kWidth;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, items = a.rows * chunks;
  Team<32 / kWidth> sharers;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i - threadIdx.x % kWarp < items; i += step) {  // a warp ends as one, as all lanes must reach every shuffle
    const int64_t row = i <= UINT32_MAX ? static_cast<unsigned>(i) / chunks : i / chunks;  // the first is much faster
    const int c = static_cast<int>(i - row * chunks) * kWidth;
    const bool exists = i < items;
    unsigned positive = 0, negative = 0;
    if (exists && c < a.classes) {
      const T* from = a.logits + row * a.row_stride + c;
      SigmoidStats<A> stats[kWidth];
#pragma unroll 5
      for (int pass = 0; pass < a.passes; ++pass) {
        using Word = typename WordOf<kWidth * sizeof(T)>::type;
        const Word word = __ldg(reinterpret_cast<const Word*>(from + pass * a.pass_stride));
        T z[kWidth];
        std::memcpy(z, &word, sizeof word);
        const A inv_k = inverse_of(static_cast<A>(pass + 1));
#pragma unroll
        for (int j = 0; j < kWidth; ++j) stats[j].add(to_acc(z[j]), inv_k, a.temp_is_2, a.limits.inv_temp);
      }
      A confidence[kWidth], deviation[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const SigmoidStats<A>& s = stats[j];
        const Thresholds<A> limits = limits_of(a, c + j);
        const bool finite = s.poison == 0;
        positive |= static_cast<unsigned>(finite && s.mean_p >= limits.tau_p && s.m2_p < limits.limit_p) << j;
        negative |= static_cast<unsigned>(finite && s.mean_q < limits.tau_n && s.m2_q < limits.limit_n) << j;
        confidence[j] = finite ? s.mean_p : A(NAN);
        deviation[j] = finite ? std_of(s.m2_p, a.passes) : A(NAN);
      }
      store_chunk<kWidth>(a.confidence + row * a.classes + c, confidence);
      store_chunk<kWidth>(a.deviation + row * a.classes + c, deviation);
    }
    if constexpr (kPacked) {
      const unsigned is = sharers.reduce(positive << (c % 32), BitOr{});
      const unsigned is_not = sharers.reduce(negative << (c % 32), BitOr{});
      if (exists && sharers.lane() == 0) {
        a.positive_bits[row * words + c / 32] = is;
        a.negative_bits[row * words + c / 32] = is_not;
      }
    } else if (exists) {
      store_flags<kWidth>(a.positive + i * kWidth, positive);
      store_flags<kWidth>(a.negative + i * kWidth, negative);
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
          chunks_aligned(logits, pass_stride, row_stride, classes, kMultilabelWidth<T>) ? kMultilabelWidth<T> : 1,
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
auto multilabel_kernel(bool packed, int width) -> void (*)(MultilabelArgs<T>) {
  constexpr int kWide = kMultilabelWidth<T>;
  if (width == 1) return packed ? mc_select_multilabel_chunks<T, true, 1> : mc_select_multilabel_chunks<T, false, 1>;
  return packed ? mc_select_multilabel_chunks<T, true, kWide> : mc_select_multilabel_chunks<T, false, kWide>;
}

}  // namespace
}  // namespace ups::cuda
