// The part of CUDA C++ that the kernels use, for a host compiler: include this, then a .cuh file with the device code
// of an op. Stands in for intrinsics.cuh, whose include guard it defines. See fibers.h for how threads run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace shim {

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Adds half a unit of the last of the `kept` upper bits, less one if that bit is 0: rounds to nearest even.
inline uint32_t round_off(uint32_t bits, int dropped) {
  return (bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped;
}

// 2^x with the largest error that the hardware's instruction may have, 2 ulp, in a direction that x decides.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  if (!(y >= 0x1p-126f)) return y != y ? y : 0.0f;  // results below the normal range are flushed
  if (x == 0 || y > 0x1p+127f) return y;
  const uint32_t hash = (bits_of<uint32_t>(x) * 2654435769u) >> 29;
  constexpr int kUlp[] = {-2, -2, -1, 0, 0, 1, 2, 2};
  return bits_of<float>(bits_of<uint32_t>(y) + kUlp[hash]);
}

}  // namespace shim

inline float __half2float(__half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 0x1f, fraction = h.bits & 0x3ff;
  if (exponent == 0x1f) return shim::bits_of<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), shim::bits_of<float>(sign));
  return shim::bits_of<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = shim::bits_of<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fff;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude >= 0x38800000u) {
    half = shim::round_off(magnitude - (112u << 23), 13);
  } else {
    half = static_cast<uint32_t>(std::nearbyint(std::ldexp(shim::bits_of<float>(magnitude), 24)));  // subnormal
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline float __bfloat162float(__nv_bfloat16 b) { return shim::bits_of<float>(static_cast<uint32_t>(b.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = shim::bits_of<uint32_t>(x);
  return {static_cast<uint16_t>(x != x ? 0x7fff : shim::round_off(bits, 16))};
}

template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) != 0) shim::fail("reads a word that is not aligned to its size");
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void __syncthreads() { shim::meet_block(); }
inline void __syncwarp(unsigned mask = ~0u) { shim::meet_warp(shim::Primitive::sync_warp, mask, 0, 0); }

// Fibers change only at meeting points, so a plain read and write is atomic.
inline int atomicAdd(int* to, int x) { return (*to += x) - x; }
inline void atomicMin(int* to, int x) { *to = std::min(*to, x); }
inline void atomicMax(int* to, int x) { *to = std::max(*to, x); }

inline void __trap() { shim::fail("traps"); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const shim::Lanes votes = shim::meet_warp(shim::Primitive::vote, mask, 0, predicate != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  const shim::Lanes words = shim::meet_warp(shim::Primitive::shuffle, mask, lane_mask << 8 | width, word);
  const int from = shim::current_lane() ^ lane_mask;
  if (from / width > shim::current_lane() / width) return value;  // beyond its segment
  if (!(mask >> from & 1)) shim::fail("a shuffle reads a lane that is not in the mask");
  std::memcpy(&value, &words[from], sizeof value);
  return value;
}

#define UPS_CUDA_INTRINSICS

namespace ups::cuda {

inline float fast_exp2(float x, float scale) { return shim::exp2_approx(x * scale); }
inline float fast_inverse(float x) { return 1.0f / x; }
inline uint8_t* dynamic_shared() { return shim::dynamic_shared(); }

}  // namespace ups::cuda
