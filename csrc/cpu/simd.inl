// SIMD vectors of UPS_VECTOR_BYTES in the compiler's own vector types: +, -, *, /, comparisons and `mask ? a : b` work
// lane by lane and compile to the instruction set of the including namespace. Included by each kernel's .inl file.

#include "../math/row_math.inl"

template <class T>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float V __attribute__((vector_size(UPS_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(UPS_VECTOR_BYTES)));
  typedef uint8_t B __attribute__((vector_size(UPS_VECTOR_BYTES / 4)));
};
template <>
struct Vectors<double> {
  typedef double V __attribute__((vector_size(UPS_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(UPS_VECTOR_BYTES)));
  typedef uint8_t B __attribute__((vector_size(UPS_VECTOR_BYTES / 8)));
};
template <class T>
using Vec = typename Vectors<T>::V;
template <class T>
using Int = typename Vectors<T>::I;  // integers of the same width; the type of a comparison: -1 true, 0 false
template <class T>
using Bytes = typename Vectors<T>::B;  // as many bytes as a vector has lanes
template <class T>
constexpr int kLanes = UPS_VECTOR_BYTES / sizeof(T);

template <class T>
UPS_HD Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

UPS_HD Int<float> splat_int(int32_t x) { return Int<float>{} + x; }

template <class V>
UPS_HD V load_unaligned(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class To, class From>
UPS_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
UPS_HD V vmax(V a, V b) {
  return a > b ? a : b;
}

// kLanes logits of storage type S as compute type T.
typedef uint16_t Halves __attribute__((vector_size(UPS_VECTOR_BYTES / 2)));  // as many as a vector has floats

UPS_HD Vec<float> load_logits(const float* from, float) { return load_unaligned<Vec<float>>(from); }
UPS_HD Vec<double> load_logits(const double* from, double) { return load_unaligned<Vec<double>>(from); }
UPS_HD Vec<float> load_logits(const BFloat16* from, float) {
  const Int<float> wide = __builtin_convertvector(load_unaligned<Halves>(from), Int<float>);
  return bits_as<Vec<float>>(wide << 16);
}
UPS_HD Vec<float> load_logits(const Half* from, float) {
  const Int<float> wide = __builtin_convertvector(load_unaligned<Halves>(from), Int<float>);
  const Int<float> magnitude = wide & 0x7fff;
  // Exponent and mantissa at float's place, then the bias set right by a product, which makes subnormals normal too.
  const Vec<float> scaled = bits_as<Vec<float>>(magnitude << 13) * 0x1p112f;
  const Int<float> infinite = (magnitude >= 0x7c00) & 0x7f800000;
  return bits_as<Vec<float>>(bits_as<Int<float>>(scaled) | infinite | ((wide & 0x8000) << 16));
}

// Loads n < kLanes logits; the other lanes repeat the first, so they change no maximum and no test for NaN.
template <class T, class S>
UPS_HD Vec<T> load_logits_tail(const S* from, int n) {
  S full[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) full[i] = from[i < n ? i : 0];
  return load_logits(full, T{});
}

// The inverse of load_logits, rounded to the nearest, of a tie to the even one.
UPS_HD void store_values(float* to, Vec<float> v) { __builtin_memcpy(to, &v, sizeof v); }
UPS_HD void store_values(double* to, Vec<double> v) { __builtin_memcpy(to, &v, sizeof v); }
UPS_HD void store_values(BFloat16* to, Vec<float> v) {
  const Int<float> bits = bits_as<Int<float>>(v);
  const Int<float> rounded = bits + ((bits >> 16 & 1) + 0x7fff);
  const Halves halves = __builtin_convertvector((v == v ? rounded : splat_int(0x7fc00000)) >> 16, Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
}
UPS_HD void store_values(Half* to, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) to[i] = static_cast<Half>(static_cast<float>(v[i]));
}

// Lane i receives lane (i + step) mod kLanes.
template <class T, int step, int... i>
UPS_HD Vec<T> rotate(Vec<T> v, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((i + step) % kLanes<T>)...);
#else
  return __builtin_shuffle(v, Int<T>{((i + step) % kLanes<T>)...});
#endif
}

// Of two vectors: lane i has a's lane i, or b's lane i - step where bit `step` of i is set; or the other way round,
// a's lane i + step or b's lane i: the two halves of a step of transpose().
template <class T, int step, bool upper, int... i>
UPS_HD Vec<T> merge(Vec<T> a, Vec<T> b, std::integer_sequence<int, i...>) {
  constexpr int L = kLanes<T>;
#if defined(__clang__)
  return upper ? __builtin_shufflevector(a, b, (i & step ? L + i : i + step)...)
               : __builtin_shufflevector(a, b, (i & step ? L + i - step : i)...);
#else
  return upper ? __builtin_shuffle(a, b, Int<T>{(i & step ? L + i : i + step)...})
               : __builtin_shuffle(a, b, Int<T>{(i & step ? L + i - step : i)...});
#endif
}

// Lane j of vector i changes places with lane i of vector j.
template <class T, int step = kLanes<T> / 2>
UPS_HD void transpose(Vec<T>* square) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & step) continue;
    const Vec<T> a = square[i], b = square[i + step];
    square[i] = merge<T, step, false>(a, b, lanes);
    square[i + step] = merge<T, step, true>(a, b, lanes);
  }
  if constexpr (step > 1) transpose<T, step / 2>(square);
}

// The maximum / sum over the lanes, in every lane; in a fixed order.
template <class T, int step = kLanes<T> / 2>
UPS_HD Vec<T> lanes_max(Vec<T> v) {
  v = vmax(v, rotate<T, step>(v, std::make_integer_sequence<int, kLanes<T>>{}));
  if constexpr (step > 1) v = lanes_max<T, step / 2>(v);
  return v;
}
template <class T, int step = kLanes<T> / 2>
UPS_HD Vec<T> lanes_sum(Vec<T> v) {
  v += rotate<T, step>(v, std::make_integer_sequence<int, kLanes<T>>{});
  if constexpr (step > 1) v = lanes_sum<T, step / 2>(v);
  return v;
}

// exp(x) for x <= 0, within 1 ulp; anything below -87 counts as -87 (1e-38). Cody-Waite reduction x = n ln2 + r, and a
// polynomial of degree 6 in r with a relative error of 3e-9 on |r| <= ln2 / 2.
UPS_HD Vec<float> exp_nonpositive(Vec<float> x) {
  x = vmax(x, splat<float>(-87.0f));
  const float shift = 0x1.8p23f;  // x + shift rounds x to an integer, which then stands in the low bits
  const Vec<float> shifted = x * 0x1.715476p0f + shift;
  const Vec<float> n = shifted - shift;
  const Vec<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // the first product is exact
  Vec<float> q = r * 0.0013814539415761828f + 0.00836874544620514f;
  q = q * r + 0.04166838899254799f;
  q = q * r + 0.1666652113199234f;
  q = q * r + 0.4999999403953552f;
  q = q * r + 1.0f;
  const Vec<float> e = q * r + 1.0f;
  return bits_as<Vec<float>>(bits_as<Int<float>>(e) + (bits_as<Int<float>>(shifted) << 23));
}
UPS_HD Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// log(x) for positive normal x, within 1 ulp or 1e-8; NaN stays NaN: x = 2^n m with m in [sqrt(1/2), sqrt(2)),
// log m = 2 artanh(s) = 2 (s + s^3 / 3 + s^5 / 5 + ...), s = (m - 1) / (m + 1).
UPS_HD Vec<float> log_positive(Vec<float> x) {
  const Int<float> bits = bits_as<Int<float>>(x);
  const Int<float> n = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 is sqrt(1/2)
  const Vec<float> m = bits_as<Vec<float>>(bits - (n << 23));
  const Vec<float> s = (m - 1) / (m + 1), s2 = s * s;
  Vec<float> series = s2 * (1.0f / 9) + 1.0f / 7;
  series = series * s2 + 1.0f / 5;
  series = series * s2 + 1.0f / 3;
  const Vec<float> log_x = __builtin_convertvector(n, Vec<float>) * 0x1.62e43p-1f + (2 * s * (series * s2) + 2 * s);
  return x == x ? log_x : x;
}
UPS_HD Vec<double> log_positive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// log(1 + x) for x >= 0 of any size; NaN stays NaN. The quotient undoes the rounding of 1 + x (Kahan).
template <class V>
UPS_HD V log_one_plus(V x) {
  const V sum = 1 + x, kept = sum - 1;
  return (kept == 0) ? x : log_positive(sum) * (x / kept);
}

// Rows in lanes: z[k * step] becomes class k of up to kLanes rows [n_rows, n_classes], lane i that of row i. Lanes
// without a row repeat the first one. What follows the classes is read too, up to `end`, and left alone.
template <class T, class S>
UPS_HD void load_rows(const S* from, int64_t stride, int64_t n_rows, int64_t n_classes, const S* end, Vec<T>* z,
                      int64_t step = 1) {
  constexpr int L = kLanes<T>;
  for (int64_t first = 0; first < n_classes; first += L) {
    const int64_t n = n_classes - first < L ? n_classes - first : L;
    Vec<T> square[L];
    for (int64_t lane = 0; lane < L; ++lane) {
      const S* const classes = from + (lane < n_rows ? lane : 0) * stride + first;
      square[lane] = classes + L <= end ? load_logits(classes, T{}) : load_logits_tail<T>(classes, static_cast<int>(n));
    }
    transpose<T>(square);
    for (int64_t k = 0; k < n; ++k) z[(first + k) * step] = square[k];
  }
}

// The inverse, to dense rows [n_rows, n_classes].
template <class T, class S>
UPS_HD void store_rows(S* to, int64_t n_rows, int64_t n_classes, const Vec<T>* z) {
  constexpr int L = kLanes<T>;
  for (int64_t first = 0; first < n_classes; first += L) {
    const int64_t n = n_classes - first < L ? n_classes - first : L;
    Vec<T> square[L];
    for (int64_t k = 0; k < L; ++k) square[k] = k < n ? z[first + k] : Vec<T>{};
    transpose<T>(square);
    for (int64_t lane = 0; lane < n_rows; ++lane) {
      S* const classes = to + lane * n_classes + first;
      if (n == L) {
        store_values(classes, square[lane]);
      } else {
        S some[L];
        store_values(some, square[lane]);
        __builtin_memcpy(classes, some, n * sizeof(S));
      }
    }
  }
}
