// Which instruction set is in use.

#include "isa.h"

#include "calr.h"

#ifdef CALR_X86
#include <cpuid.h>
#endif

namespace {

calr::Isa best() {
#ifdef CALR_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
#ifdef CALR_PAIRS
    if (__builtin_cpu_supports("avx512bf16")) return calr::kAvx512BFloat16;
#endif
    return calr::kAvx512;
  }
  unsigned a, b, c = 0, d;  // older compilers know no "f16c"
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) return calr::kAvx2;
#endif
  return calr::kScalar;
}

}  // namespace

calr::Isa calr::chosen = best();

int32_t calr_isa() { return calr::chosen; }

int32_t calr_select_isa(int32_t isa) {
  if (isa < calr::kScalar || isa > best()) return -1;
  calr::chosen = static_cast<calr::Isa>(isa);
  return 0;
}
