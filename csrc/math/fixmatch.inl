// The consistency loss of one row (Sohn et al. 2020, equation 4), from two rows of logits: w of the weak view, z of the
// strong one. No include guard, as in row_math.inl. V: a number or a vector of numbers, M: what comparing them gives.
//
//   y = argmax_c w_c        q_y = 1 / sum_c exp((w_c - w_y) / T)        the row counts where q_y >= tau
//   m = max z               e_c = exp(z_c - m)      rest = sum e without the (first) top class      s = 1 + rest
//   CE = log(1 + rest) + (m - z_y)                  dCE/dz_c = e_c / s - [c = y]
//
// `rest` is why a nearly certain row keeps its digits: see loss_row.h. For c = y the slope is -(1 - p_y), where
// 1 - p_y = rest / s for the top class.

template <class V>
UPS_HD V fixmatch_ce(V log_sum, V top, V z_target) {
  return log_sum + (top - z_target);
}

template <class V, class M>
UPS_HD V fixmatch_slope(V e, V inv_sum, V rest, M is_top, M is_target) {
  const V p = e * inv_sum;
  const V not_p = is_top ? rest * inv_sum : 1 - p;
  return is_target ? -not_p : p;
}
