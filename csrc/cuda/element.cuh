// How the kernels read logits: element types, aligned chunks, and the one fast function they need.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>
#include <cstring>

namespace ups {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

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

// kWidth neighbours in one load. `from` must be aligned to their size.
template <int kWidth, class T>
__device__ __forceinline__ void load_chunk(const T* from, float* z) {
  using Word = typename WordOf<kWidth * sizeof(T)>::type;
  const Word word = __ldg(reinterpret_cast<const Word*>(from));
  T x[kWidth];
  std::memcpy(x, &word, sizeof word);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) z[i] = to_float(x[i]);
}

// What a slot past the last class holds: it loses every maximum and its exponential is 0.
constexpr float kNoLogit = -FLT_MAX;

// kWidth neighbours from class c on; kNoLogit past the last of `classes`. kAligned: c is a multiple of kWidth, C is one
// too, and the chunk is aligned to its size.
template <int kWidth, bool kAligned, class T>
__device__ __forceinline__ void load_classes(const T* row /* [C] */, int c, int classes, float* z) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) z[i] = kNoLogit;
  if constexpr (kAligned) {
    if (c < classes) load_chunk<kWidth>(row + c, z);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (c + i < classes) z[i] = to_float(__ldg(row + c + i));
    }
  }
}

template <int kWidth, class T>
__device__ __forceinline__ void load_classes(const T* row /* [C] */, int c, int classes, bool aligned, float* z) {
  if (aligned) {
    load_classes<kWidth, true>(row, c, classes, z);
  } else {
    load_classes<kWidth, false>(row, c, classes, z);
  }
}

// 2^(x * scale) for x <= 0 < scale: one rounding of the product, then 2 ulp from one instruction (exp2f spends three
// more on results below 2^-126, here 0). `volatile` and the product inside keep the compiler from holding on to a value,
// and to its register, where computing it again is cheaper.
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

}  // namespace ups
