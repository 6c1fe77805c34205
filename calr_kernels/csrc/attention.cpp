// What a decoder's block computes between its linear layers, behind a C interface: RMS norms, rotary
// position embeddings, attention of one query a head.

#include <vector>

#include "isa.h"
#include "pool.h"

namespace {

using calr::chosen, calr::kAvx2, calr::kAvx512;

// y = weight * x / sqrt(mean(x^2) + epsilon), rows [begin, end) of x [M, K].
template <typename X>
void rms_norm(const X* x, const X* weight, X* y, int64_t k, float epsilon, int64_t begin,
              int64_t end) {
#ifdef CALR_X86
  if (chosen == kAvx512) return avx512::rms_norm(x, weight, y, k, epsilon, begin, end);
  if (chosen == kAvx2) return avx2::rms_norm(x, weight, y, k, epsilon, begin, end);
#endif
  scalar::rms_norm(x, weight, y, k, epsilon, begin, end);
}

template <typename X>
void attend(const X* q, const X* keys, const X* values, X* y, int64_t group, int64_t count,
            int64_t d, float scale, float* scratch) {
#ifdef CALR_X86
  if (chosen == kAvx512) {
    return avx512::attend(q, keys, values, y, group, count, d, scale, scratch);
  }
  if (chosen == kAvx2) return avx2::attend(q, keys, values, y, group, count, d, scale, scratch);
#endif
  scalar::attend(q, keys, values, y, group, count, d, scale, scratch);
}

}  // namespace

extern "C" {

// y [M, K] = weight [K] * x / sqrt(mean(x^2) + epsilon) by rows: what is multiplied by the weight is
// rounded first. All of one type, contiguous.
void calr_rms_norm(const void* x, const void* weight, void* y, int64_t m, int64_t k, float epsilon,
                   int32_t type, int32_t threads) {
  typed(type, [&](auto value) {
    using X = decltype(value);
    calr::parallel(threads, m, k, [&](int64_t begin, int64_t end) {
      rms_norm(static_cast<const X*>(x), static_cast<const X*>(weight), static_cast<X*>(y), k,
               epsilon, begin, end);
    });
  });
}

// In place: every head [d] of x [M, heads, d] turned by the angles of cos and sin, whose rows lie
// `stride` apart: x * cos + (-second half, first half) * sin. Products round where separate operations
// would.
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

// y [B, heads * group, d] = softmax(scale * q keys') values: one query a head, q as y, and `group`
// heads to one of keys and values [B, heads, count, d]. All of one type, contiguous.
void calr_attend(const void* q, const void* keys, const void* values, void* y, int64_t b,
                 int64_t heads, int64_t group, int64_t count, int64_t d, float scale, int32_t type,
                 int32_t threads) {
  typed(type, [&](auto value) {
    using X = decltype(value);
    auto run = [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> buffer;
      buffer.resize(group * (d + count) + d);
      for (int64_t i = begin; i < end; ++i) {
        attend(static_cast<const X*>(q) + i * group * d,
               static_cast<const X*>(keys) + i * count * d,
               static_cast<const X*>(values) + i * count * d, static_cast<X*>(y) + i * group * d,
               group, count, d, scale, buffer.data());
      }
    };
    calr::parallel(threads, b * heads, 2 * group * count * d, run);
  });
}

}  // extern "C"
