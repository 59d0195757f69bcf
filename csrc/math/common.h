// Functions of the math/ headers are compiled three ways: by nvcc for host and device, by the host compiler for the
// CPU kernels, and once per instruction set (see cpu/isa.h). They are templates over the number type: `float` and
// `double` on a GPU, a SIMD vector of them on a CPU.
#pragma once

#if defined(__CUDACC__)
#define UPS_HD __host__ __device__ __forceinline__
#else
#define UPS_HD inline __attribute__((always_inline))
#endif
