// The loops over a row's elements, compiled once per instruction set (each_isa.h).

#include "../math/counter_dropout.inl"

template <class S, class T>
UPS_HD S dropped(S x, uint32_t key, uint32_t element, uint32_t threshold, T scale) {
  return is_kept(key, element, threshold) ? static_cast<S>(static_cast<T>(x) * scale) : S(T(0));
}

template <class S, class T>
void dropout_rows(const DropoutArgs<S, T>& a, int64_t begin, int64_t end) {
  const auto C = static_cast<uint32_t>(a.C), spatial = static_cast<uint32_t>(a.S), n = C * spatial;
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t key = layer_key(static_cast<uint32_t>(a.keys[row]), a.layer);
    const S* const x = a.x + row * n;
    S* const y = a.y + row * n;
    if (a.channels_last) {
      for (uint32_t i = 0; i < n; ++i) y[i] = dropped(x[i], key, i, a.threshold, a.scale);
    } else {
      for (uint32_t c = 0; c < C; ++c) {
        for (uint32_t s = 0; s < spatial; ++s) {
          y[c * spatial + s] = dropped(x[c * spatial + s], key, s * C + c, a.threshold, a.scale);
        }
      }
    }
  }
}
