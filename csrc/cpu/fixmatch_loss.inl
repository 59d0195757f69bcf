// A block of kLanes rows at a time, a row in each lane and class k in vector k, compiled once per instruction set
// (each_isa.h). Formulas and names in math/fixmatch.inl.

#include "simd.inl"

#include "../math/fixmatch.inl"

// Classes are counted in lanes of 32 bits, or 64 with doubles: as many as a row can have.
template <class T>
UPS_HD Int<T> class_number(int64_t k) {
  return Int<T>{} + static_cast<decltype(Int<T>{}[0] + 0)>(k);
}

// The sum of term(k) over the classes: of sums of 16, so that a thousand small terms are not lost one by one.
template <class T, class Term>
UPS_HD Vec<T> sum_of(int64_t n_classes, const Term& term) {
  Vec<T> sum{}, part{};
  for (int64_t k = 0; k < n_classes; ++k) {
    part += term(k);
    if (k % 16 == 15) {
      sum += part;
      part = Vec<T>{};
    }
  }
  return sum + part;
}

// The most probable class in each lane, the lowest of a tie, and its probability: NaN where a logit is not finite.
template <class T>
struct PseudoLabels {
  Int<T> label;
  Vec<T> confidence;

  UPS_HD PseudoLabels(const Vec<T>* w /* [C] */, int64_t n_classes, T inv_temperature) {
    Vec<T> top = w[0], poison{};
    label = Int<T>{};
    for (int64_t k = 0; k < n_classes; ++k) {
      const Int<T> better = w[k] > top;
      top = better ? w[k] : top;
      label = better ? class_number<T>(k) : label;
      poison += w[k] * T(0);  // 0 * NaN and 0 * inf are NaN
    }
    const Vec<T> sum = sum_of<T>(n_classes, [&](int64_t k) { return exp_nonpositive((w[k] - top) * inv_temperature); });
    confidence = 1 / (sum + poison);
  }
};

// The softmax of the strong rows: e_c = exp(z_c - top) in z's place, `rest` as in the formulas.
template <class T>
struct StrongRows {
  Vec<T> top, rest;

  UPS_HD StrongRows(Vec<T>* z /* [C] */, int64_t n_classes) {
    top = splat<T>(-INFINITY);  // a NaN loses every comparison and is found below
    for (int64_t k = 0; k < n_classes; ++k) top = vmax(z[k], top);
    Vec<T> tops{};
    rest = sum_of<T>(n_classes, [&](int64_t k) {
      const Vec<T> below = z[k] - top;
      const Int<T> top_here = below == 0;
      const Vec<T> e = exp_nonpositive(below);
      z[k] = (below == below) ? e : below;
      tops += top_here ? splat<T>(1) : Vec<T>{};
      return top_here ? Vec<T>{} : z[k];
    });
    rest += tops - 1;
  }
};

// Mask, pseudo-labels and cross-entropies of rows [begin, end).
template <class S, class T>
void fixmatch_rows(const FixmatchArgs<S, T>& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  Aligned scratch(a.C * sizeof(Vec<T>));
  Vec<T>* const z = static_cast<Vec<T>*>(scratch.data);
  for (int64_t row = begin; row < end; row += L) {
    const int64_t n_rows = end - row < L ? end - row : L;
    load_rows<T>(a.weak.data + row * a.weak.stride, a.weak.stride, n_rows, a.C, a.weak.end, z);
    const PseudoLabels<T> found(z, a.C, a.inv_temperature);
    Int<T> target = class_number<T>(-1);
    bool any = false;
    for (int64_t i = 0; i < n_rows; ++i) {
      const T tau = a.class_tau ? a.class_tau[found.label[i]] : a.tau;
      a.mask[row + i] = found.confidence[i] >= tau;
      if (a.mask[row + i] && !(a.weight && a.weight[row + i] == 0)) target[i] = found.label[i], any = true;
      a.target[row + i] = target[i];
      a.ce[row + i] = 0;
    }
    if (!any) continue;
    load_rows<T>(a.strong.data + row * a.strong.stride, a.strong.stride, n_rows, a.C, a.strong.end, z);
    Vec<T> z_target{};
    for (int64_t k = 0; k < a.C; ++k) z_target = (target == class_number<T>(k)) ? z[k] : z_target;
    const StrongRows<T> softmax(z, a.C);
    const Vec<T> ce = fixmatch_ce(log_one_plus(softmax.rest), softmax.top, z_target);
    for (int64_t i = 0; i < n_rows; ++i) {
      if (target[i] >= 0) a.ce[row + i] = ce[i];
    }
  }
}

// Gradients of rows [begin, end).
template <class S, class T>
void d_fixmatch_rows(const FixmatchBackwardArgs<S, T>& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  Aligned scratch(a.C * sizeof(Vec<T>));
  Vec<T>* const z = static_cast<Vec<T>*>(scratch.data);
  for (int64_t row = begin; row < end; row += L) {
    const int64_t n_rows = end - row < L ? end - row : L;
    Int<T> target = class_number<T>(-1);
    Vec<T> factor{};
    bool any = false;
    for (int64_t i = 0; i < n_rows; ++i) {
      const int64_t class_of_row = a.target[row + i];
      if (class_of_row < 0) continue;
      target[i] = class_of_row, any = true;
      factor[i] = a.d_loss[(row + i) * a.d_loss_stride] * a.scale * (a.weight ? a.weight[row + i] : T(1));
    }
    if (!any) {
      __builtin_memset(a.d_strong + row * a.C, 0, n_rows * a.C * sizeof(S));
      continue;
    }
    load_rows<T>(a.strong.data + row * a.strong.stride, a.strong.stride, n_rows, a.C, a.strong.end, z);
    const StrongRows<T> softmax(z, a.C);
    const Vec<T> inv_sum = 1 / (1 + softmax.rest);
    const Int<T> counts = target >= 0;
    for (int64_t k = 0; k < a.C; ++k) {
      const Int<T> is_top = z[k] == 1, is_target = target == class_number<T>(k);
      const Vec<T> d = factor * fixmatch_slope(z[k], inv_sum, softmax.rest, is_top, is_target);
      z[k] = counts ? d : Vec<T>{};  // a NaN in a row that counts for nothing stays there
    }
    store_rows<T>(a.d_strong + row * a.C, n_rows, a.C, z);
  }
}
