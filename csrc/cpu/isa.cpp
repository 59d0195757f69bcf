#include "isa.h"

namespace ups {

Isa best_isa() {
#if UPS_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

static Isa current = best_isa();

Isa isa() { return current; }
void set_isa(Isa isa) { current = isa; }

}  // namespace ups
