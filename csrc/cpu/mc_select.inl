// Device code of mc_select for one instruction set. See mc_select.cpp for what is computed.
//
// Two layouts share all arithmetic. A block is [K] vectors per pass:
//   rows in lanes     lane = one of kLanes rows, vector k = class k                    K = C         (few classes)
//   classes in lanes  lane = a class, vector k = classes k * kLanes and up, one row    K = ceil(C / kLanes)
// They differ in how logits come in, in whether a reduction over classes must also cross the lanes, and in how the
// verdicts go out.
//
// Stage 1, for each pass: m = max z; b = exp((z - m) / 2) kept; sums of b and b^2.       exps [P, K]
// Stage 2, for each k:    over the passes q = b / sum b, p = b^2 / sum b^2, Welford on both, verdicts.
// With a temperature other than 2 stage 1 keeps exp(z - m) and exp((z - m) / temp) instead.

#include "simd.inl"

template <class T, class S, bool rows_in_lanes, bool temp_is_2>
struct McSelectBlock {
  static constexpr int L = kLanes<T>;
  static constexpr int kExps = temp_is_2 ? 1 : 2;
  using V = Vec<T>;
  using I = Int<T>;
  using Sum = std::conditional_t<rows_in_lanes, V, T>;  // over the classes, of each lane's row or of the one row

  const McSelectArgs<S, T>& a;
  const int64_t k_count;  // K
  V* const exps;          // [P, K, kExps]
  Sum* const inv_p;       // [P], 1 / sum of exp(z - m)
  Sum* const inv_q;       // [P], 1 / sum of exp((z - m) / temp)
  I* const negatives;     // [K], -1 where mean_q and std_q pass the thresholds

  static int64_t vectors_needed(int64_t passes, int64_t n_classes) {
    const int64_t k_count = rows_in_lanes ? n_classes : (n_classes + L - 1) / L;
    return passes * k_count * kExps + 2 * passes + k_count;
  }
  McSelectBlock(const McSelectArgs<S, T>& args, V* scratch)
      : a(args),
        k_count(rows_in_lanes ? args.C : (args.C + L - 1) / L),
        exps(scratch),
        inv_p(reinterpret_cast<Sum*>(exps + args.P * k_count * kExps)),
        inv_q(reinterpret_cast<Sum*>(exps + args.P * k_count * kExps + args.P)),
        negatives(reinterpret_cast<I*>(exps + args.P * k_count * kExps + 2 * args.P)) {}

  // Logits of rows [row, row + n_rows) of one pass into exps[pass, :, 0].
  void load_pass(int64_t pass, int64_t row, int64_t n_rows) {
    const S* const from = a.logits + pass * a.stride_p + row * a.stride_n;
    V* const z = exps + pass * k_count * kExps;
    if constexpr (rows_in_lanes) {
      load_rows<T>(from, a.stride_n, n_rows, a.C, a.end, z, kExps);
    } else {
      const int64_t full = a.C / L;
      for (int64_t k = 0; k < full; ++k) z[k * kExps] = load_logits(from + k * L, T{});
      if (full < k_count) z[full * kExps] = load_logits_tail<T>(from + full * L, static_cast<int>(a.C - full * L));
    }
  }

  // 0 in lanes of the last vector that hold no class, 1 elsewhere.
  V class_exists() const {
    V exists;
    for (int i = 0; i < L; ++i) exists[i] = (k_count - 1) * L + i < a.C;
    return exists;
  }

  // Stage 1. Returns a vector that is NaN in the lane (rows in lanes) or in any lane of a row with a non-finite logit.
  V exponentials() {
    V poison{};
    const V exists = class_exists();
    for (int64_t pass = 0; pass < a.P; ++pass) {
      V* const z = exps + pass * k_count * kExps;
      V top = z[0];
      for (int64_t k = 0; k < k_count; ++k) {
        top = vmax(z[k * kExps], top);
        poison += z[k * kExps] * T(0);
      }
      if constexpr (!rows_in_lanes) top = lanes_max<T>(top);
      const V half_top = top * T(0.5);
      V sum_p{}, sum_q{}, part_p{}, part_q{};
      for (int64_t k = 0; k < k_count; ++k) {
        V p, q;
        if constexpr (temp_is_2) {
          q = exp_nonpositive(z[k] * T(0.5) - half_top);  // one operation, and exactly half of z - top
          if (!rows_in_lanes && k == k_count - 1) q *= exists;
          z[k] = q;
          p = q * q;
        } else {
          const V below = z[k * kExps] - top;
          p = exp_nonpositive(below);
          q = exp_nonpositive(below * a.t.inv_temp);
          if (!rows_in_lanes && k == k_count - 1) {
            p *= exists;
            q *= exists;
          }
          z[k * kExps] = p;
          z[k * kExps + 1] = q;
        }
        part_p += p;
        part_q += q;
        if (k % 16 == 15 || k == k_count - 1) {  // sums of sums: a thousand small terms are not lost one by one
          sum_p += part_p;
          sum_q += part_q;
          part_p = part_q = V{};
        }
      }
      if constexpr (rows_in_lanes) {
        inv_p[pass] = sum_p;
        inv_q[pass] = sum_q;
      } else {
        inv_p[pass] = lanes_sum<T>(sum_p)[0];
        inv_q[pass] = lanes_sum<T>(sum_q)[0];
      }
    }
    for (int64_t pass = 0; pass < a.P; ++pass) {
      inv_p[pass] = 1 / inv_p[pass];
      inv_q[pass] = 1 / inv_q[pass];
    }
    return poison;
  }

  // Stage 2. Fills `negatives`; best_* become mean, M2 and class index of the largest mean p in each lane.
  void statistics(V& best_mean, V& best_m2, I& best_class) {
    best_mean = splat<T>(-1);
    best_m2 = V{};
    best_class = I{};
    I class_index{};
    if constexpr (!rows_in_lanes) {
      for (int i = 0; i < L; ++i) class_index[i] = i;
    }
    for (int64_t k = 0; k < k_count; ++k) {
      V mean_p{}, m2_p{}, mean_q{}, m2_q{};
      const V* e = exps + k * kExps;
      for (int64_t pass = 0; pass < a.P; ++pass, e += k_count * kExps) {
        const T inv_k = a.inv_k[pass];
        if constexpr (temp_is_2) {
          welford(mean_p, m2_p, rounded_product<V>(e[0] * e[0], V{} + inv_p[pass]), inv_k);
          welford(mean_q, m2_q, rounded_product<V>(e[0], V{} + inv_q[pass]), inv_k);
        } else {
          welford(mean_p, m2_p, rounded_product<V>(e[0], V{} + inv_p[pass]), inv_k);
          welford(mean_q, m2_q, rounded_product<V>(e[1], V{} + inv_q[pass]), inv_k);
        }
      }
      negatives[k] = (mean_q < a.t.tau_n) & (m2_q < a.t.limit_n);
      const I better = mean_p > best_mean;  // strict: the lowest class wins a tie
      best_mean = better ? mean_p : best_mean;
      best_m2 = better ? m2_p : best_m2;
      best_class = better ? class_index : best_class;
      class_index += rows_in_lanes ? 1 : L;
    }
  }

  void write_row(int64_t row, int64_t label, T mean, T m2, bool finite) const {
    a.label[row] = finite ? label : -1;
    a.confidence[row] = finite ? mean : T(NAN);
    a.deviation[row] = finite ? std_of(m2, a.P) : T(NAN);
    a.positive[row] = finite && mean >= a.t.tau_p && m2 < a.t.limit_p;
  }

  void run(int64_t row, int64_t n_rows) {
    for (int64_t pass = 0; pass < a.P; ++pass) load_pass(pass, row, n_rows);
    const V poison = exponentials();
    V best_mean, best_m2;
    I best_class;
    statistics(best_mean, best_m2, best_class);
    if constexpr (rows_in_lanes) {
      const I finite = poison == poison;
      for (int64_t lane = 0; lane < n_rows; ++lane) {
        write_row(row + lane, best_class[lane], best_mean[lane], best_m2[lane], finite[lane]);
      }
      for (int64_t k = 0; k < k_count; ++k)
        negatives[k] &= finite & (best_class != I{} + static_cast<decltype(I{}[0] + 0)>(k));
      write_negatives_of_lanes(row, n_rows);
    } else {
      bool finite = true;
      int best = 0;
      for (int i = 0; i < L; ++i) {
        finite &= poison[i] == poison[i];
        const bool better =
            best_mean[i] > best_mean[best] || (best_mean[i] == best_mean[best] && best_class[i] < best_class[best]);
        best = better ? i : best;
      }
      const int64_t label = best_class[best];
      write_row(row, label, best_mean[best], best_m2[best], finite);
      if (!finite) {
        for (int64_t k = 0; k < k_count; ++k) negatives[k] = I{};
      }
      negatives[label / L][label % L] = 0;
      write_negatives_of_row(row);
    }
  }

  void write_negatives_of_lanes(int64_t row, int64_t n_rows) const {
    const int64_t words = (a.C + 31) / 32;
    for (int64_t lane = 0; lane < n_rows; ++lane) {
      if (a.packed) {
        uint32_t* const out = reinterpret_cast<uint32_t*>(a.negative) + (row + lane) * words;
        for (int64_t w = 0; w < words; ++w) out[w] = 0;
        for (int64_t c = 0; c < a.C; ++c) out[c / 32] |= (negatives[c][lane] & 1u) << (c % 32);
      } else {
        uint8_t* const out = reinterpret_cast<uint8_t*>(a.negative) + (row + lane) * a.C;
        for (int64_t c = 0; c < a.C; ++c) out[c] = negatives[c][lane] & 1;
      }
    }
  }

  void write_negatives_of_row(int64_t row) const {
    const int64_t words = (a.C + 31) / 32;
    uint32_t* const packed = reinterpret_cast<uint32_t*>(a.negative) + row * words;
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(a.negative) + row * a.C;
    if (a.packed) {
      for (int64_t w = 0; w < words; ++w) packed[w] = 0;
    }
    for (int64_t k = 0; k < k_count; ++k) {
      const int64_t first = k * L;
      const int n = static_cast<int>(a.C - first < L ? a.C - first : L);
      if (a.packed) {
        uint32_t word = 0;
        for (int i = 0; i < n; ++i) word |= static_cast<uint32_t>(negatives[k][i] & 1) << i;
        packed[first / 32] |= word << (first % 32);  // L divides 32
      } else {
        const Bytes<T> flags = __builtin_convertvector(negatives[k], Bytes<T>) & 1;
        if (n == L) {
          __builtin_memcpy(bytes + first, &flags, L);
        } else {
          for (int i = 0; i < n; ++i) bytes[first + i] = flags[i];
        }
      }
    }
  }
};

template <class S, class T, bool rows_in_lanes, bool temp_is_2>
void mc_select_range(const McSelectArgs<S, T>& args, int64_t begin, int64_t end) {
  using Block = McSelectBlock<T, S, rows_in_lanes, temp_is_2>;
  const int64_t vectors = Block::vectors_needed(args.P, args.C);
  Aligned scratch(vectors * sizeof(Vec<T>));
  Block block(args, static_cast<Vec<T>*>(scratch.data));
  constexpr int64_t step = rows_in_lanes ? kLanes<T> : 1;
  for (int64_t row = begin; row < end; row += step) block.run(row, end - row < step ? end - row : step);
}

// Rows [begin, end) of the call.
template <class S, class T>
void mc_select_rows(const McSelectArgs<S, T>& args, int64_t begin, int64_t end) {
  const bool temp_is_2 = args.t.inv_temp == T(0.5);
  // Rows in lanes waste no lane, but hold P * C vectors at once: beyond this they leave the first-level cache.
  const bool rows_in_lanes = args.C <= 2 * kLanes<T>;
  if (rows_in_lanes) {
    temp_is_2 ? mc_select_range<S, T, true, true>(args, begin, end)
              : mc_select_range<S, T, true, false>(args, begin, end);
  } else {
    temp_is_2 ? mc_select_range<S, T, false, true>(args, begin, end)
              : mc_select_range<S, T, false, false>(args, begin, end);
  }
}
