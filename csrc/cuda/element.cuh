// The elements of tensors: types, aligned chunks of logits, and two functions in their fast form.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>
#include <cstring>

namespace ups::cuda {

// Kernels compute in float32, but in float64 for float64.
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ double to_acc(double x) { return x; }

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(double* to, double x) { *to = x; }

// An unsigned word, or group of words, of a given number of bytes: what one load or store moves.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// What a slot past the last class holds: it loses every maximum and its exponential is 0.
constexpr float kNoLogit = -FLT_MAX;

// The logits of kWidth neighbors, of which the first `count` exist (none if it is negative); kNoLogit for the others.
// kAligned: `from` is aligned to all of them together, and all or none exist.
template <int kWidth, bool kAligned, class T>
__device__ __forceinline__ void load_chunk(const T* from, int count, float* z) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) z[i] = kNoLogit;
  if constexpr (kAligned) {
    using Word = typename WordOf<kWidth * sizeof(T)>::type;
    if (count > 0) {
      const Word word = __ldg(reinterpret_cast<const Word*>(from));
      T x[kWidth];
      std::memcpy(x, &word, sizeof word);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) z[i] = to_acc(x[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) z[i] = to_acc(__ldg(from + i));
    }
  }
}

template <int kWidth, class T>
__device__ __forceinline__ void load_chunk(const T* from, int count, bool aligned, float* z) {
  if (aligned) {
    load_chunk<kWidth, true>(from, count, z);
  } else {
    load_chunk<kWidth, false>(from, count, z);
  }
}

// 2^(x * scale) for x <= 0 < scale: one rounding of the product, then 2 ulp from one instruction (exp2f spends three
// more on results below 2^-126, here 0). `volatile` and the product inside keep the compiler from holding on to a
// value, and to its register, where computing it again is cheaper.
__device__ __forceinline__ float fast_exp2(float x, float scale) {
#ifdef UPS_FAST_SHIM
  return shim::exp2_approx(x * scale);
#else
  float y;
  asm volatile(
      "{\n\t"
      ".reg .f32 scaled;\n\t"
      "mul.f32 scaled, %1, %2;\n\t"
      "ex2.approx.ftz.f32 %0, scaled;\n\t"
      "}"
      : "=f"(y)
      : "f"(x), "f"(scale));
  return y;
#endif
}

// 1 / x for x >= 1, correctly rounded but for rare last bits: the hardware's estimate and one Newton step. A division
// would bring a subroutine for x that cannot occur here.
__device__ __forceinline__ float fast_inverse(float x) {
#ifdef UPS_FAST_SHIM
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.0f), y);
#endif
}

}  // namespace ups::cuda
