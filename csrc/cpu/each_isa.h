// Includes UPS_ISA_SOURCE once per instruction set, each time in a namespace of that name and with UPS_VECTOR_BYTES
// set. No include guard: each kernel file includes it once. The source may include only other .inl files.

#if UPS_X86

#define UPS_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
namespace ups::avx512 {
#include UPS_ISA_SOURCE
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef UPS_VECTOR_BYTES

#define UPS_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace ups::avx2 {
#include UPS_ISA_SOURCE
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef UPS_VECTOR_BYTES

#endif  // UPS_X86

#define UPS_VECTOR_BYTES 16  // SSE2, NEON, and whatever the compiler makes of it elsewhere
namespace ups::baseline {
#include UPS_ISA_SOURCE
}
#undef UPS_VECTOR_BYTES
