// An image at a time, class k * kLanes + i in lane i of vector k, compiled once per instruction set (each_isa.h).
// Formulas and names in math/multilabel.inl.

#include "simd.inl"

#include "../math/multilabel.inl"
#include "mask_lanes.inl"

// log(1 + x) for 0 <= x <= 1, within 1 ulp: 2 artanh(s) = 2 (s + s^3 / 3 + ...), s = x / (2 + x) <= 1/3.
UPS_HD Vec<float> log_one_plus_small(Vec<float> x) {
  const Vec<float> s = x / (2 + x), s2 = s * s;
  Vec<float> series = s2 * (1.0f / 13) + 1.0f / 11;
  series = series * s2 + 1.0f / 9;
  series = series * s2 + 1.0f / 7;
  series = series * s2 + 1.0f / 5;
  series = series * s2 + 1.0f / 3;
  return 2 * s * (series * s2) + 2 * s;
}
UPS_HD Vec<double> log_one_plus_small(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log1p(x[i]);
  return x;
}

// What is known of the classes of vector k of a row.
template <class T>
struct Entries {
  Int<T> selected, positive;
  Vec<T> z, weight;
};

template <class S, class T>
class MultilabelRow {
  static constexpr int L = kLanes<T>;

 public:
  MultilabelRow(const MultilabelRows<S, T>& a, int64_t i)
      : C(a.C),
        z(a.logits + i * a.stride),
        weight(a.entry_weight ? a.entry_weight + i * a.entry_stride : nullptr),
        positive(a.positive.row(i)),
        negative(a.negative.row(i)) {}

  UPS_HD static int64_t vectors(int64_t n_classes) { return (n_classes + L - 1) / L; }
  UPS_HD int lanes(int64_t k) const { return static_cast<int>(C - k * L < L ? C - k * L : L); }

  // Of selected classes.
  T count() const {
    int64_t total = 0;
    if (positive.bytes && negative.bytes) {
      int64_t c = 0;
      for (uint64_t eight[2]; c + 8 <= C; c += 8) {
        __builtin_memcpy(eight, positive.bytes + c, 8);
        __builtin_memcpy(eight + 1, negative.bytes + c, 8);
        total += __builtin_popcountll(eight[0] | eight[1]);
      }
      for (; c < C; ++c) total += positive.bytes[c] | negative.bytes[c];
    } else {
      Int<T> sum{};
      for (int64_t k = 0; k < vectors(C); ++k) sum -= mask_lanes<T>(positive, k, C) | mask_lanes<T>(negative, k, C);
      for (int i = 0; i < L; ++i) total += sum[i];
    }
    return static_cast<T>(total);
  }

  // An entry of weight 0 is none: nobody looks at its logit.
  UPS_HD Entries<T> entries(int64_t k) const {
    Entries<T> e;
    e.positive = mask_lanes<T>(positive, k, C);
    e.selected = e.positive | mask_lanes<T>(negative, k, C);
    e.z = load(z, k);
    e.weight = splat<T>(1);
    if (weight) {
      e.weight = load(weight, k);
      e.selected &= e.weight != 0;
    }
    return e;
  }

 private:
  template <class A>
  UPS_HD Vec<T> load(const A* from, int64_t k) const {
    return lanes(k) == L ? load_logits(from + k * L, T{}) : load_logits_tail<T>(from + k * L, lanes(k));
  }

  const int64_t C;
  const S* const z;       // [C]
  const T* const weight;  // [C], or null
  const MaskRow positive, negative;
};

// Losses of images [begin, end) without their weights, 0 where they count for nothing; and whether they count.
template <class S, class T>
void multilabel_rows(const MultilabelRows<S, T>& a, T* loss /* [N] */, char* counts /* [N] */, int64_t begin,
                     int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const MultilabelRow<S, T> row(a, i);
    const T count = a.weight && a.weight[i] == 0 ? T(0) : row.count();
    counts[i] = count > 0;
    loss[i] = 0;
    if (count == 0) continue;
    Vec<T> sum{}, part{};
    for (int64_t k = 0; k < row.vectors(a.C); ++k) {
      const Entries<T> e = row.entries(k);
      const Vec<T> s = e.positive ? -e.z : e.z;
      const Vec<T> entry = absent_loss(s, log_one_plus_small(exp_nonpositive(minus_size(s)))) * e.weight;
      part += e.selected ? entry : Vec<T>{};
      if (k % 16 == 15) {  // sums of sums: a thousand small terms are not lost one by one
        sum += part;
        part = Vec<T>{};
      }
    }
    loss[i] = lanes_sum<T>(sum + part)[0] / count;
  }
}

// Gradients of images [begin, end). d_loss is [N] with its stride, or [] with stride 0.
template <class S, class T>
void d_multilabel_rows(const MultilabelRows<S, T>& a, const T* d_loss, int64_t d_loss_stride, T scale,
                       S* d_logits /* [N, C] */, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  for (int64_t i = begin; i < end; ++i) {
    const MultilabelRow<S, T> row(a, i);
    S* const d_row = d_logits + i * a.C;
    const T weight = a.weight ? a.weight[i] : T(1);
    const T count = weight == 0 ? T(0) : row.count();
    if (count == 0) {
      __builtin_memset(d_row, 0, a.C * sizeof(S));
      continue;
    }
    const T factor = d_loss[i * d_loss_stride] * scale * weight / count;
    for (int64_t k = 0; k < row.vectors(a.C); ++k) {
      const Entries<T> e = row.entries(k);
      const Vec<T> s = e.positive ? -e.z : e.z;
      const Vec<T> u = exp_nonpositive(minus_size(s)), slope = sigmoid_of(s, u, 1 / (1 + u));
      const Vec<T> of_entry = (s == s ? slope : s) * e.weight * factor;
      const Vec<T> d = e.positive ? -of_entry : of_entry;
      const Vec<T> kept = e.selected ? d : Vec<T>{};
      if (row.lanes(k) == L) {
        store_values(d_row + k * L, kept);
      } else {
        S some[L];
        store_values(some, kept);
        __builtin_memcpy(d_row + k * L, some, row.lanes(k) * sizeof(S));
      }
    }
  }
}
