// A vector of elements at a time, compiled once per instruction set (each_isa.h).

#include "simd.inl"

#include "../math/mish.inl"

constexpr float mish_range(float) { return 87.0f; }  // exp_nonpositive ends there
constexpr double mish_range(double) { return 700.0; }

template <class S, class T>
UPS_HD Vec<T> mish_vector(const MishArgs<S, T>& a, Vec<T> x, Vec<T> d_y) {
  const auto m = Mish<Vec<T>>::of(x, mish_range(T{}), [](Vec<T> v) { return exp_nonpositive(v); });
  return a.d_y ? d_y * m.slope(T{}) : m.value(x);
}

template <class S, class T>
void mish_elements(const MishArgs<S, T>& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  int64_t i = begin;
  for (; i + L <= end; i += L) {
    const Vec<T> d_y = a.d_y ? load_logits(a.d_y + i, T{}) : Vec<T>{};
    store_values(a.y + i, mish_vector(a, load_logits(a.x + i, T{}), d_y));
  }
  if (i == end) return;
  const int rest = static_cast<int>(end - i);
  const Vec<T> d_y = a.d_y ? load_logits_tail<T>(a.d_y + i, rest) : Vec<T>{};
  S last[L];
  store_values(last, mish_vector(a, load_logits_tail<T>(a.x + i, rest), d_y));
  for (int k = 0; k < rest; ++k) a.y[i + k] = last[k];
}
