// The elements of tensors: types, and aligned chunks of logits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "intrinsics.cuh"

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
struct WordOf<1> {
  using type = unsigned char;
};
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

// Stores neighbors that are aligned to all of them together.
template <int kWidth, class T>
__device__ __forceinline__ void store_chunk(T* to, const T* x /* [kWidth] */) {
  using Word = typename WordOf<kWidth * sizeof(T)>::type;
  Word word;
  std::memcpy(&word, x, sizeof word);
  *reinterpret_cast<Word*>(to) = word;
}

// The lowest kWidth bits as bytes of 0 or 1, in one store.
template <int kWidth>
__device__ __forceinline__ void store_flags(bool* to, unsigned flags) {
  unsigned bytes = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) bytes |= (flags >> i & 1u) << (8 * i);
  using Word = typename WordOf<kWidth>::type;
  *reinterpret_cast<Word*>(to) = static_cast<Word>(bytes);
}

// What a slot past the last class holds: it loses every maximum and its exponential is 0.
constexpr float kMasked = -FLT_MAX;

// The logits of kWidth neighbors, of which the first `count` exist (none if it is negative); kMasked for the others.
// kAligned: `from` is aligned to all of them together, and all or none exist.
template <int kWidth, bool kAligned, class T>
__device__ __forceinline__ void load_chunk(const T* from, int count, float* z) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) z[i] = kMasked;
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

// Whether every chunk of `width` neighbors can be one load.
template <class T>
bool chunks_aligned(const T* logits, int64_t pass_stride, int64_t row_stride, int64_t classes, int width) {
  return classes % width == 0 && row_stride % width == 0 && pass_stride % width == 0 &&
         reinterpret_cast<uintptr_t>(logits) % (width * sizeof(T)) == 0;
}

}  // namespace ups::cuda
