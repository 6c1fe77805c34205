// Attention of one query a head, and the rotary position embeddings of queries and keys.

#include <cstdint>
#include <vector>

#include "calr.h"
#include "isa.h"
#include "pool.h"

void calr_rotate(void* x, const void* cosines, const void* sines, int64_t m, int64_t heads, int64_t d,
                 int64_t stride, int32_t type) {
  typed(type, [&](auto value) {
    using X = decltype(value);
    const int64_t half = d / 2;
    for (int64_t i = 0; i < m * heads; ++i) {
      X* head = static_cast<X*>(x) + i * d;
      const X* c = static_cast<const X*>(cosines) + i / heads * stride;
      const X* s = static_cast<const X*>(sines) + i / heads * stride;
      for (int64_t j = 0; j < half; ++j) {
        const float a = widen(head[j]), b = widen(head[j + half]);
        narrow(rounded<X>(a * widen(c[j])) - rounded<X>(b * widen(s[j])), head + j);
        narrow(rounded<X>(b * widen(c[j + half])) + rounded<X>(a * widen(s[j + half])),
               head + j + half);
      }
    }
  });
}

void calr_attend(const void* q, const void* keys, const void* values, void* y, int64_t b,
                 int64_t heads, int64_t group, int64_t count, int64_t d, float scale, int32_t type,
                 int32_t threads) {
  typed(type, [&](auto value) {
    using X = decltype(value);
    auto run = [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> buffer;
      buffer.resize(group * (d + count) + d);
      for (int64_t i = begin; i < end; ++i) {
        CALR_BY_ISA(attend, static_cast<const X*>(q) + i * group * d,
                    static_cast<const X*>(keys) + i * count * d,
                    static_cast<const X*>(values) + i * count * d, static_cast<X*>(y) + i * group * d,
                    group, count, d, scale, buffer.data());
      }
    };
    calr::parallel(threads, b * heads, 2 * group * count * d, run);
  });
}
