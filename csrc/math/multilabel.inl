// One class of multi-label UPS: the sigmoid of its logit z at two temperatures, and its binary cross-entropy. No include
// guard, as in row_math.inl. V: a number or a vector of numbers, M: what comparing them gives.
//
//   e = exp(-|z|)            sigmoid(z) = 1 / (1 + e) for z >= 0, e / (1 + e) below: nothing overflows
//   s = -z where y, else z   the loss is that of a class which should be absent at logit s:
//   BCE = -log sigmoid(-s) = max(s, 0) + log(1 + e)            dBCE/ds = sigmoid(s)
//
// So neither a logarithm of a probability nor 1 - p is ever formed, and a logit of any size keeps its digits.

// e = exp(-|z|). Rounded on its own, as Welford's subtraction follows.
template <class V>
UPS_HD V sigmoid_of(V z, V e) {
  const V inverse = 1 / (1 + e);
  return rounded_product<V>(inverse, z < 0 ? e : V{} + 1);
}

template <class V>
UPS_HD V absent_loss(V s, V log_one_plus_e) {
  return (s < 0 ? V{} : s) + log_one_plus_e;  // NaN stays NaN
}
