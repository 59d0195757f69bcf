// Blocks of rows, compiled once per instruction set (each_isa.h). A lane is a class of a sample, and vector k of a
// block its classes k * kLanes and up, of all its rows in a row. See mc_select_multilabel.cpp for what is computed.

#include "simd.inl"

#include "../math/multilabel.inl"

// Mean and M2 over the passes of the sigmoids of kLanes classes; poison: NaN where a logit is not finite.
template <class T>
struct SigmoidStats {
  Vec<T> mean_p, m2_p, mean_q, m2_q, poison;
};

template <bool temp_is_2, class S, class T>
UPS_HD SigmoidStats<T> sigmoid_stats(const MultilabelArgs<S, T>& a, const S* from, int n) {
  using V = Vec<T>;
  SigmoidStats<T> stats = {};
  for (int64_t pass = 0; pass < a.P; ++pass, from += a.stride_p) {
    const V z = from + kLanes<T> <= a.end ? load_logits(from, T{}) : load_logits_tail<T>(from, n);
    stats.poison += z * T(0);
    V e_p, e_q;
    if constexpr (temp_is_2) {
      e_q = exp_nonpositive(minus_size(z) * T(0.5));
      e_p = e_q * e_q;
    } else {
      e_p = exp_nonpositive(minus_size(z));
      e_q = exp_nonpositive(minus_size(z) * a.inv_temp);
    }
    const V inverse_p = 1 / (1 + e_p), inverse_q = 1 / (1 + e_q);
    welford(stats.mean_p, stats.m2_p, sigmoid_of(z, e_p, inverse_p), a.inv_k[pass]);
    welford(stats.mean_q, stats.m2_q, sigmoid_of(z, e_q, inverse_q), a.inv_k[pass]);
  }
  return stats;
}

template <class V>
UPS_HD V square_roots(V x) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// The first n lanes.
template <class T>
UPS_HD void store_some(T* to, Vec<T> v, int n) {
  if (n == kLanes<T>) {
    store_values(to, v);
  } else {
    for (int i = 0; i < n; ++i) to[i] = v[i];
  }
}
template <class T>
UPS_HD void store_flags(uint8_t* to, Int<T> flags, int n) {
  const Bytes<T> bytes = __builtin_convertvector(flags, Bytes<T>) & 1;
  if (n == kLanes<T>) {
    __builtin_memcpy(to, &bytes, sizeof bytes);
  } else {
    for (int i = 0; i < n; ++i) to[i] = bytes[i];
  }
}

// One block: `count` classes of all its rows, from row `row` on. Flags of its classes go to positive and negative.
template <bool temp_is_2, class S, class T>
void select_block(const MultilabelArgs<S, T>& a, int64_t row, int64_t count, uint8_t* positive, uint8_t* negative) {
  constexpr int L = kLanes<T>;
  const S* const from = a.logits + row * a.stride_n;
  const T freedom = static_cast<T>(a.P > 1 ? a.P - 1 : 1);  // M2 of one pass is 0
  const int64_t to = row * a.C;
  for (int64_t i = 0; i < count; i += L) {
    const int n = static_cast<int>(count - i < L ? count - i : L);
    const SigmoidStats<T> stats = sigmoid_stats<temp_is_2>(a, from + i, n);
    const T* const limits = a.limits + i;
    const auto limit = [&](int which) { return load_unaligned<Vec<T>>(limits + which * a.limits_stride); };
    const Int<T> finite = stats.poison == stats.poison;
    store_flags<T>(positive + i, finite & (stats.mean_p >= limit(0)) & (stats.m2_p < limit(1)), n);
    store_flags<T>(negative + i, finite & (stats.mean_q < limit(2)) & (stats.m2_q < limit(3)), n);
    store_some<T>(a.confidence + to + i, stats.mean_p + stats.poison, n);  // NaN, or as it is
    store_some<T>(a.deviation + to + i, square_roots(stats.m2_p / freedom) + stats.poison, n);
  }
}

// Blocks [begin, end) of the call.
template <class S, class T>
void mc_select_multilabel_blocks(const MultilabelArgs<S, T>& a, int64_t begin, int64_t end) {
  const bool temp_is_2 = a.inv_temp == T(0.5);
  const int64_t words = (a.C + 31) / 32, room = a.limits_stride;
  Aligned scratch(a.packed ? 2 * room : 0);
  uint8_t* const flags = static_cast<uint8_t*>(scratch.data);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * a.rows, rows = a.N - row < a.rows ? a.N - row : a.rows;
    uint8_t* const positive = a.packed ? flags : static_cast<uint8_t*>(a.positive) + row * a.C;
    uint8_t* const negative = a.packed ? flags + room : static_cast<uint8_t*>(a.negative) + row * a.C;
    temp_is_2 ? select_block<true>(a, row, rows * a.C, positive, negative)
              : select_block<false>(a, row, rows * a.C, positive, negative);
    for (int64_t i = 0; a.packed && i < rows; ++i) {
      pack_bytes(positive + i * a.C, a.C, static_cast<uint32_t*>(a.positive) + (row + i) * words);
      pack_bytes(negative + i * a.C, a.C, static_cast<uint32_t*>(a.negative) + (row + i) * words);
    }
  }
}
