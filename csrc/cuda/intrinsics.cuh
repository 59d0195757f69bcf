// What only a GPU can do: two functions in their fast form, and shared memory whose size is chosen at launch. The
// tests' CUDA on the CPU has its own in place of this file.
#ifndef UPS_CUDA_INTRINSICS
#define UPS_CUDA_INTRINSICS

#include <cstdint>

namespace ups::cuda {

// 2^(x * scale) for x <= 0 < scale: one rounding of the product, then 2 ulp from one instruction (exp2f spends three
// more on results below 2^-126, here 0). `volatile` and the product inside keep the compiler from holding on to a
// value, and to its register, where computing it again is cheaper.
__device__ __forceinline__ float fast_exp2(float x, float scale) {
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
}

// 1 / x for x >= 1, correctly rounded but for rare last bits: the hardware's estimate and one Newton step. A division
// would bring a subroutine for x that cannot occur here.
__device__ __forceinline__ float fast_inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.0f), y);
}

__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<uint8_t*>(memory);
}

}  // namespace ups::cuda

#endif  // UPS_CUDA_INTRINSICS
