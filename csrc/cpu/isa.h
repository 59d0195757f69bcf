// Which instruction set the CPU kernels run on. Every kernel is compiled once per set from the same source
// (each_isa.h), and the best one that this processor and operating system offer is chosen when the library loads.
#pragma once

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define UPS_X86 1
#else
#define UPS_X86 0
#endif

namespace ups {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };  // in order of preference

Isa best_isa();         // the best that runs here
Isa isa();              // the one in use: best_isa() unless set_isa() chose another
void set_isa(Isa isa);  // for tests and comparisons; not thread-safe; must be <= best_isa()

}  // namespace ups

// Calls the function of this name compiled for the instruction set in use.
#if UPS_X86
#define UPS_ISA_CALL(function, ...)                                          \
  (::ups::isa() == ::ups::Isa::avx512 ? ::ups::avx512::function(__VA_ARGS__) \
   : ::ups::isa() == ::ups::Isa::avx2 ? ::ups::avx2::function(__VA_ARGS__)   \
                                      : ::ups::baseline::function(__VA_ARGS__))
#else
#define UPS_ISA_CALL(function, ...) ::ups::baseline::function(__VA_ARGS__)
#endif
