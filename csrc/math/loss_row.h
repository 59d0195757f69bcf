// The two losses of one row of logits z [C], from its shifted exponentials.
//
//   m = max z        e_c = exp(z_c - m)        p_c = e_c / s        s = sum e = 1 + rest
//
// `rest` is the sum without the (first) largest logit. It is kept apart because 1 - p_top = rest / s is exact to
// rounding even where p_top is 1 - 1e-6, where 1 - p would keep one digit; no other class can have p > 1/2.
//
// CE   = m + log s - z_t                        dCE/dz_j  = p_j - [j = t]           for a class t as target
// CE   = T log s + sum_c t_c (m - z_c)          dCE/dz_j  = T p_j - t_j             for a row t, T = sum_c t_c
// NCE  = -sum_c g_c log(max(1 - p_c, eps)) / G  dNCE/dz_j = (w_j - p_j sum_c w_c) / G
//        w_c = g_c p_c / (1 - p_c), or 0 where 1 - p_c < eps (the clamp is flat)    G = sum_c g_c + eps    eps = 1e-7
//
// Derivation of the latter: d(-log(1 - p_c))/dp_c = 1 / (1 - p_c) and dp_c/dz_j = p_c ([c = j] - p_j), so
// dNCE/dz_j = sum_c g_c p_c / (1 - p_c) ([c = j] - p_j) / G.
//
// For the top class, where w may be 1e6, that difference is formed as w_j (1 - p_j) - p_j sum_{c != j} w_c; and that of
// CE, where both terms may be near 1, as p_j sum_{c != j} t_c - t_j (1 - p_j).
#pragma once

#include <cstdint>

#include "row_stats.h"

namespace ups {

constexpr double kNceEps = 1e-7;

enum Reduction : int64_t { kNone, kMean, kSum, kBatchMean };  // as the ops take them

// What the sum over a group of rows is divided by; 0 stands for the sum of their weights.
inline double divisor_of(int64_t reduction, int64_t rows) {
  if (reduction == kMean) return 0;
  return reduction == kBatchMean && rows > 0 ? static_cast<double>(rows) : 1;
}

}  // namespace ups
