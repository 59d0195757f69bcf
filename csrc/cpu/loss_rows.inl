// The losses of one row and their gradients for one instruction set; formulas and names in math/loss_row.h.
// Classes lie in the lanes: vector k holds classes k * kLanes and up.

#include "simd.inl"

#include "mask_lanes.inl"

template <class T, class S>
class LossRow {
  static constexpr int L = kLanes<T>;
  using V = Vec<T>;
  using I = Int<T>;

 public:
  static int64_t bytes_needed(int64_t n_classes) { return 3 * ((n_classes + L - 1) / L) * sizeof(V); }

  LossRow(int64_t n_classes, void* scratch)
      : C(n_classes),
        k_count((n_classes + L - 1) / L),
        p(static_cast<V*>(scratch)),
        not_p(p + k_count),
        w(not_p + k_count) {}

  // Reads logits [C]: p, 1 - p, rest and their normalizer.
  void read(const S* logits) {
    V highest = splat<T>(-INFINITY);  // never NaN: a NaN logit loses every comparison and is found below
    for (int64_t k = 0; k < k_count; ++k) {
      p[k] = load_vector(logits, k);
      highest = vmax(p[k], highest);
    }
    highest = lanes_max<T>(highest);
    top = highest[0];
    V others{}, tops{};
    for (int64_t k = 0; k < k_count; ++k) {
      const V below = p[k] - highest;
      const I top_here = below == 0;
      p[k] = exp_nonpositive(below);
      p[k] = (below == below) ? p[k] : below;  // NaN stays NaN
      if (k == k_count - 1) p[k] = class_exists() ? p[k] : V{};
      others += top_here ? V{} : p[k];
      tops += top_here ? p[k] : V{};
    }
    // `rest` leaves out one top class; others that tie with it count.
    const V rest_lanes = lanes_sum<T>(others) + (lanes_sum<T>(tops) - 1);
    rest = rest_lanes[0];
    p_top = 1 / (1 + rest_lanes);
    for (int64_t k = 0; k < k_count; ++k) {
      p[k] = p[k] * p_top;
      not_p[k] = is_top(k) ? rest_lanes * p_top : 1 - p[k];
    }
  }

  T ce(const S* logits, int64_t target) const { return std::log1p(rest) + (top - static_cast<T>(logits[target])); }

  void d_ce(int64_t target, T weight, S* d_logits) {
    for (int64_t k = 0; k < k_count; ++k) w[k] = p[k];
    w[target / L][target % L] = -not_p[target / L][target % L];
    store(weight, d_logits);
  }

  // Sets w to the target of each class: keep * target + even; 0 beyond the last one.
  void spread(const T* soft /* [C], or null */, int64_t target, T keep, T even) {
    for (int64_t k = 0; k < k_count; ++k) {
      const int64_t left = C - k * L;
      V t{};
      if (soft)
        t = left >= L ? load_logits(soft + k * L, T{}) : load_logits_tail<T>(soft + k * L, static_cast<int>(left));
      w[k] = t * keep + even;
    }
    w[k_count - 1] = class_exists() ? w[k_count - 1] : V{};
    if (!soft) w[target / L][target % L] += keep;
  }

  // After `spread`.
  T ce_spread(const S* logits) const {
    V cross{}, total{};
    for (int64_t k = 0; k < k_count; ++k) {
      cross += (w[k] == 0) ? V{} : w[k] * (splat<T>(top) - load_vector(logits, k));  // 0 * inf would be NaN
      total += w[k];
    }
    return lanes_sum<T>(total)[0] * std::log1p(rest) + lanes_sum<T>(cross)[0];
  }

  void d_ce_spread(T weight, S* d_logits) {
    V sum_top{}, sum_other{};
    for (int64_t k = 0; k < k_count; ++k) {
      sum_top += is_top(k) ? w[k] : V{};
      sum_other += is_top(k) ? V{} : w[k];
    }
    sum_top = lanes_sum<T>(sum_top);
    sum_other = lanes_sum<T>(sum_other);
    for (int64_t k = 0; k < k_count; ++k) {
      const V of_top = p[k] * (sum_other + (sum_top - w[k])) - w[k] * not_p[k];
      const V of_other = p[k] * (sum_other + sum_top) - w[k];
      w[k] = is_top(k) ? of_top : of_other;
    }
    store(weight, d_logits);
  }

  T nce(const MaskRow& mask) const {
    V sum{}, count{};
    for (int64_t k = 0; k < k_count; ++k) {
      const I g = mask_lanes<T>(mask, k, C);
      sum += g ? log_positive(clamped(not_p[k])) : V{};
      count += g ? splat<T>(1) : V{};
    }
    return -lanes_sum<T>(sum)[0] / (lanes_sum<T>(count)[0] + T(kNceEps));
  }

  void d_nce(const MaskRow& mask, T weight, S* d_logits) {
    V sum_top{}, sum_other{}, count{};
    for (int64_t k = 0; k < k_count; ++k) {
      const I g = mask_lanes<T>(mask, k, C);
      w[k] = (g & ~(not_p[k] < T(kNceEps))) ? p[k] / not_p[k] : V{};
      sum_top += is_top(k) ? w[k] : V{};
      sum_other += is_top(k) ? V{} : w[k];
      count += g ? splat<T>(1) : V{};
    }
    sum_top = lanes_sum<T>(sum_top);
    sum_other = lanes_sum<T>(sum_other);
    for (int64_t k = 0; k < k_count; ++k) {
      // w_j - p_j sum w; for the top class, whose w may be 1e6, with w_j (1 - p_j) in one piece.
      const V of_top = w[k] * not_p[k] - p[k] * (sum_other + (sum_top - w[k]));
      const V of_other = w[k] - p[k] * (sum_other + sum_top);
      w[k] = is_top(k) ? of_top : of_other;
    }
    store(weight / (lanes_sum<T>(count)[0] + T(kNceEps)), d_logits);
  }

 private:
  V load_vector(const S* logits, int64_t k) const {
    const int64_t left = C - k * L;
    return left >= L ? load_logits(logits + k * L, T{}) : load_logits_tail<T>(logits + k * L, static_cast<int>(left));
  }
  I class_exists() const {
    I exists;
    for (int i = 0; i < L; ++i) exists[i] = -static_cast<int>((k_count - 1) * L + i < C);
    return exists;
  }
  I is_top(int64_t k) const { return p[k] == p_top; }  // its e is exactly 1

  // At least eps; NaN stays NaN.
  static V clamped(V x) { return x < T(kNceEps) ? splat<T>(T(kNceEps)) : x; }

  void store(T weight, S* d_logits) const {
    for (int64_t k = 0; k < k_count; ++k) {
      const V d = w[k] * weight;
      const int64_t n = C - k * L < L ? C - k * L : L;
      for (int64_t i = 0; i < n; ++i) d_logits[k * L + i] = static_cast<S>(d[i]);
    }
  }

  const int64_t C;
  const int64_t k_count;
  V* const p;      // [K]
  V* const not_p;  // [K], 1 - p
  V* const w;      // [K]
  T top;           // the largest logit
  T rest;          // sum of e without one top class
  V p_top;         // 1 / s, the probability of the largest logit
};

template <class S, class T>
void spread(LossRow<T, S>& row, const LossRows<S, T>& a, int64_t i) {
  row.spread(a.soft ? a.soft + i * a.soft_stride : nullptr, a.target ? a.target[i] : 0, a.keep, a.even);
}

// Losses of rows [begin, end).
template <class S, class T>
void loss_rows(const LossRows<S, T>& a, T* loss, int64_t begin, int64_t end) {
  Aligned scratch(LossRow<T, S>::bytes_needed(a.C));
  LossRow<T, S> row(a.C, scratch.data);
  for (int64_t i = begin; i < end; ++i) {
    loss[i] = 0;
    if (a.kind[i] == RowKind::none) continue;
    const S* const logits = a.logits + i * a.stride;
    row.read(logits);
    if (a.kind[i] == RowKind::negative) {
      loss[i] = row.nce(a.mask.row(i));
    } else if (!a.spread) {
      loss[i] = row.ce(logits, a.target[i]);
    } else {
      spread(row, a, i);
      loss[i] = row.ce_spread(logits);
    }
  }
}

// Gradients of rows [begin, end), each times its weight.
template <class S, class T>
void d_loss_rows(const LossRows<S, T>& a, const T* weight, S* d_logits, int64_t begin, int64_t end) {
  Aligned scratch(LossRow<T, S>::bytes_needed(a.C));
  LossRow<T, S> row(a.C, scratch.data);
  for (int64_t i = begin; i < end; ++i) {
    S* const d_row = d_logits + i * a.C;
    if (a.kind[i] == RowKind::none) {
      for (int64_t c = 0; c < a.C; ++c) d_row[c] = static_cast<S>(0.0f);
      continue;
    }
    row.read(a.logits + i * a.stride);
    if (a.kind[i] == RowKind::negative) {
      row.d_nce(a.mask.row(i), weight[i], d_row);
    } else if (!a.spread) {
      row.d_ce(a.target[i], weight[i], d_row);
    } else {
      spread(row, a, i);
      row.d_ce_spread(weight[i], d_row);
    }
  }
}
