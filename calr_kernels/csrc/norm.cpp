// RMS norms.

#include <cstdint>

#include "calr.h"
#include "isa.h"
#include "team.h"

void calr_rms_norm(const void* x, const void* weight, void* y, int64_t m, int64_t k, float epsilon,
                   int32_t type, int32_t threads) {
  typed(type, [&](auto value) {
    using X = decltype(value);
    calr::parallel(threads, m, k, [&](int64_t begin, int64_t end) {
      CALR_BY_ISA(rms_norm, static_cast<const X*>(x), static_cast<const X*>(weight), static_cast<X*>(y), k,
                  epsilon, false, begin, end);
    });
  });
}
