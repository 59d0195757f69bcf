// The loops over a row's elements, compiled once per instruction set (each_isa.h).

#include "../math/counter_dropout.inl"

// By a mask of bits, not a choice: the loops below are vectors then, where a product that may trap would be a branch.
template <class S, class T>
UPS_HD S dropped(S x, uint32_t key, uint32_t element, uint32_t threshold, T scale) {
  using Bits = std::conditional_t<sizeof(S) == 8, uint64_t, std::conditional_t<sizeof(S) == 4, uint32_t, uint16_t>>;
  S y = static_cast<S>(static_cast<T>(x) * scale);
  Bits bits;
  __builtin_memcpy(&bits, &y, sizeof(S));
  bits &= static_cast<Bits>(-static_cast<Bits>(is_kept(key, element, threshold)));
  __builtin_memcpy(&y, &bits, sizeof(S));
  return y;
}

template <class S, class T>
void dropout_rows(const DropoutArgs<S, T>& a, int64_t begin, int64_t end) {
  const auto C = static_cast<uint32_t>(a.C), spatial = static_cast<uint32_t>(a.S), n = C * spatial;
  const uint32_t threshold = a.threshold;
  const T scale = a.scale;
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t key = layer_key(static_cast<uint32_t>(a.keys[row]), a.layer);
    const S* __restrict const x = a.x + row * n;
    S* __restrict const y = a.y + row * n;
    if (a.channels_last) {
      for (uint32_t i = 0; i < n; ++i) y[i] = dropped(x[i], key, i, threshold, scale);
    } else {
      for (uint32_t c = 0; c < C; ++c) {
        for (uint32_t s = 0; s < spatial; ++s) {
          y[c * spatial + s] = dropped(x[c * spatial + s], key, s * C + c, threshold, scale);
        }
      }
    }
  }
}
