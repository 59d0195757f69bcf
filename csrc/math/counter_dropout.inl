// Which elements dropout keeps: a pure function of a row's key, the layer and the element. No include guard, as in
// row_math.inl.

// A bijection of 32 bits in which every bit depends on every other: the constants of C. Wellons' "lowbias32" (2018).
UPS_HD uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

UPS_HD uint32_t layer_key(uint32_t row_key, uint32_t layer) { return mix(row_key + layer * 0x9e3779b9u); }

// Elements of a row count channels first: element (c, s) of [C, S] is s * C + c.
UPS_HD bool is_kept(uint32_t layer_key, uint32_t element, uint32_t threshold) {
  return mix(layer_key ^ element) >= threshold;
}
