// mish(x) = x tanh(log(1 + e^x)) and its derivative, with a single exponential. No include guard, as in row_math.inl.
//
// tanh(log(1 + e)) = (e^2 + 2e) / (e^2 + 2e + 2). With u = e^-|x|, which cannot overflow, t and its derivative are
//     x <= 0:  t = (u^2 + 2u) / D,  t' = 4 (1 + u) u   / D^2,  D = u^2 + 2u + 2
//     x  > 0:  t = (1 + 2u)   / D,  t' = 4 (1 + u) u^2 / D^2,  D = 1 + 2u + 2u^2
// and mish = x t, mish' = t + x t'. V: a number or a vector of numbers S.

template <class V>
UPS_HD V not_below(V x, V low) {
  return x < low ? low : x;  // NaN stays
}
template <class V>
UPS_HD V not_above(V x, V high) {
  return x > high ? high : x;
}

template <class V>
struct Mish {
  V x;     // within +-range, beyond which mish is x or 0 to the last bit
  V u, t;  // as above
  V inverse;

  // exp_of(v) for v <= 0
  template <class S, class Exp>
  UPS_HD static Mish of(V value, S range, Exp exp_of) {
    const V limit = V{} + range;
    const V x = not_above(not_below(value, V{} - limit), limit);
    const V u = exp_of(x > V{} ? V{} - x : x);
    const V small = u * (u + S(2)), large = u * S(2) + S(1);
    const V inverse = S(1) / (x > V{} ? large + u * u * S(2) : small + S(2));
    return {x, u, (x > V{} ? large : small) * inverse, inverse};
  }

  UPS_HD V value(V all) const { return not_below(all, x) * t; }  // x itself from the range upwards

  template <class S>
  UPS_HD V slope(S) const {
    const V grown = (u + S(1)) * (x > V{} ? u * u : u);
    return t + x * (grown * inverse) * (inverse * S(4));
  }
};
