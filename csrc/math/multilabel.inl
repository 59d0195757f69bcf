// One class of multi-label UPS: the sigmoid of its logit z, and its binary cross-entropy. No include guard, as in
// row_math.inl. V: a number or a vector of numbers.
//
//   e = exp(-|z|)            sigmoid(z) = 1 / (1 + e) from 0 upwards, e / (1 + e) below: nothing overflows
//   s = -z where y, else z   the class should be absent by s, whatever y is:
//   BCE = -log sigmoid(-s) = max(s, 0) + log(1 + e)            dBCE/ds = sigmoid(s)
//
// Neither the logarithm of a probability nor 1 - p is formed, so a logit of any size keeps its digits. At temperature 2
// both sigmoids share one exponential: exp(-|z|) is the square of exp(-|z| / 2).

template <class V>
UPS_HD V minus_size(V z) {
  return z < 0 ? z : -z;  // NaN stays NaN
}

// inverse = 1 / (1 + e). Rounded on its own, as Welford's subtraction follows (see rounded_product).
template <class V>
UPS_HD V sigmoid_of(V z, V e, V inverse) {
  const V above = V{} + 1;
  const V numerator = z < 0 ? e : above;
  return rounded_product(inverse, numerator);
}

template <class V>
UPS_HD V absent_loss(V s, V log_one_plus_e) {
  const V above = s < 0 ? V{} : s;  // NaN stays NaN
  return above + log_one_plus_e;
}
