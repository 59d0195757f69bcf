// Elementwise arithmetic shared by every backend. No include guard and no namespace of its own: a GPU file includes it
// once with scalars in mind, a CPU file once per instruction set with SIMD vectors (a function keeps the instruction
// set it was defined under, so one definition cannot serve several).

// a * b rounded on its own. A compiler may fuse a product into the sum it feeds, and each use would then see another
// value: equal probabilities of all passes would no longer have a std of exactly 0.
#if defined(__CUDA_ARCH__)
UPS_HD float rounded_product(float a, float b) { return __fmul_rn(a, b); }
UPS_HD double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#else
template <class V>
UPS_HD V rounded_product(V a, V b) {
  V product = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}
#endif

// Welford's update with the k-th value (inv_k = 1 / k, k from 1), in the form that cannot make M2 negative:
// M2 += delta^2 (k - 1) / k. Equal values leave M2 at exactly 0 (see rounded_product).
template <class V, class S>
UPS_HD void welford(V& mean, V& m2, V x, S inv_k) {
  const V delta = x - mean;
  mean += delta * inv_k;
  m2 += delta * delta * (1 - inv_k);
}
