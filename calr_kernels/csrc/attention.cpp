// Attention of one query a head, and the rotary position embeddings of queries and keys.

#include <cstdint>
#include <vector>

#include "calr.h"
#include "isa.h"
#include "team.h"

void calr_rotate(void* x, const void* cosines, const void* sines, int64_t m, int64_t heads, int64_t d,
                 int64_t stride, int32_t type) {
  typed(type, [&](auto value) {
    using X = decltype(value);
    std::vector<float> wide(d);
    for (int64_t i = 0; i < m * heads; ++i) {
      X* head = static_cast<X*>(x) + i * d;
      const X* c = static_cast<const X*>(cosines) + i / heads * stride;
      const X* s = static_cast<const X*>(sines) + i / heads * stride;
      for (int64_t j = 0; j < d; ++j) wide[j] = widen(head[j]);
      CALR_BY_ISA(rotate, wide.data(), c, s, d);
      for (int64_t j = 0; j < d; ++j) narrow(wide[j], head + j);
    }
  });
}

void calr_attend(const void* q, const void* keys, const void* values, void* y, int64_t b,
                 int64_t heads, int64_t group, int64_t count, int64_t d, float scale, int32_t type,
                 int32_t threads) {
  typed(type, [&](auto value) {
    using X = decltype(value);
    calr::parallel(threads, b * heads, 2 * group * count * d, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(group * (2 * d + count + 2));
      float *wide = buffer.data(), *out = wide + group * d, *scores = out + group * d;
      float *most = scores + group * count, *total = most + group;
      for (int64_t i = begin; i < end; ++i) {
        const X* own = static_cast<const X*>(q) + i * group * d;
        X* to = static_cast<X*>(y) + i * group * d;
        for (int64_t j = 0; j < group * d; ++j) wide[j] = scale * widen(own[j]);
        CALR_BY_ISA(gather, wide, static_cast<const X*>(keys) + i * count * d,
                    static_cast<const X*>(values) + i * count * d, most, total, out, group, count, d,
                    scores);
        for (int64_t j = 0; j < group * d; ++j) narrow(out[j] / total[j / d], to + j);
      }
    });
  });
}
