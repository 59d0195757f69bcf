// Statistics over the MC-dropout passes of one (sample, class), and the thresholds they are held against.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common.h"

namespace ups {

#include "row_math.inl"

// The thresholds of one mc_select call in the kernels' own terms. A std is never needed to compare it:
//   std < kappa  <=>  M2 < kappa^2 (P - 1),   M2 = sum over passes of (x - mean)^2
template <class T>
struct Thresholds {
  T tau_p;     // positive: mean_p >= tau_p
  T tau_n;     // negative: mean_q <  tau_n
  T limit_p;   // positive: M2_p   <  limit_p = kappa_p^2 (P - 1)
  T limit_n;   // negative: M2_q   <  limit_n = kappa_n^2 (P - 1)
  T inv_temp;  // q = softmax(z * inv_temp)
};

template <class T>
T m2_limit(double kappa, int64_t passes) {
  if (passes == 1 || std::isinf(kappa)) return std::numeric_limits<T>::infinity();  // one pass has no std to limit
  const T limit = static_cast<T>(kappa * kappa * static_cast<double>(passes - 1));
  // A kappa whose square underflows still accepts a std of exactly 0.
  return kappa > 0 ? std::fmax(limit, std::numeric_limits<T>::denorm_min()) : T(0);
}

// The same on a device, of the kappa of one class.
template <class T>
UPS_HD T m2_limit_of(T kappa, int64_t passes) {
  if (passes == 1) return T(INFINITY);
  const T limit = kappa * kappa * static_cast<T>(passes - 1);
  return kappa > 0 && limit == 0 ? std::numeric_limits<T>::denorm_min() : limit;
}

template <class T>
Thresholds<T> make_thresholds(double tau_p, double tau_n, double kappa_p, double kappa_n, double temp_nl,
                              int64_t passes) {
  return {static_cast<T>(tau_p), static_cast<T>(tau_n), m2_limit<T>(kappa_p, passes), m2_limit<T>(kappa_n, passes),
          static_cast<T>(1.0 / temp_nl)};
}

// Unbiased standard deviation; 0 for a single pass.
template <class T>
UPS_HD T std_of(T m2, int64_t passes) {
  return passes > 1 ? std::sqrt(m2 / static_cast<T>(passes - 1)) : T(0);
}

}  // namespace ups
