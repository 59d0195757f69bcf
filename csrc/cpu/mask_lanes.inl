// Which of the classes of vector k are in a row's mask: -1 or 0 in each lane, 0 beyond the last class. For the MaskRow
// of loss_rows.h; included after simd.inl.

template <class T, int... i>
UPS_HD Int<T> bit_of_each_lane(std::integer_sequence<int, i...>) {
  return Int<T>{(1 << i)...};
}

template <class T>
UPS_HD Int<T> mask_lanes(const MaskRow& mask, int64_t k, int64_t n_classes) {
  constexpr int L = kLanes<T>;
  typedef uint8_t Bytes __attribute__((vector_size(L)));
  const int64_t first = k * L;
  const int64_t n = n_classes - first < L ? n_classes - first : L;
  if (mask.words) {
    const uint32_t exists = (1u << n) - 1;                                  // n <= 16
    const uint32_t word = mask.words[first / 32] >> (first % 32) & exists;  // L divides 32
    const Int<T> all = Int<T>{} + static_cast<decltype(Int<T>{}[0] + 0)>(word);
    return (all & bit_of_each_lane<T>(std::make_integer_sequence<int, L>{})) != 0;
  }
  Bytes bytes{};
  if (n == L) {
    __builtin_memcpy(&bytes, mask.bytes + first, L);
  } else {
    __builtin_memcpy(&bytes, mask.bytes + first, n);
  }
  return __builtin_convertvector(bytes, Int<T>) != 0;
}
