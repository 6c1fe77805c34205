// Low-rank linear layers for small batches on a CPU, behind a C interface.
//
// y = up (down x) + bias, x [M, K], down [r, K], up [rows, r]. Both products are dot products of
// contiguous weight rows, so every weight byte is read once, in order, and nothing is packed: the
// cost is the memory traffic. Weights are float32, bfloat16 or float16, accumulation is float32 in
// a fixed order (the same bits for any number of threads), and the intermediate rounds to x's type
// once. The instruction set is chosen at run time.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pool.h"

namespace {

enum Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(bfloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float widen(float16 value) {
  uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  uint32_t exponent = (value.bits >> 10) & 31, fraction = value.bits & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (fraction << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {  // subnormal: fraction * 2^-24, exact in float32
    float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline void narrow(float value, float* out) { *out = value; }

inline void narrow(float value, bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40);  // a NaN stays one
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

inline void narrow(float value, float16* out) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    out->bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds beyond 65504
    out->bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: let float32 addition round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    out->bits = static_cast<uint16_t>(sign | (bits - 0x3f000000));
  } else {
    bits += 0xc8000fff + ((bits >> 13) & 1);
    out->bits = static_cast<uint16_t>(sign | (bits >> 13));
  }
}

// One implementation per instruction set: dot products of ROWS weight rows with COLUMNS inputs.
#define CALR_NAMESPACE scalar
#define CALR_LANES 4
#include "dots.inl"
#undef CALR_NAMESPACE
#undef CALR_LANES

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CALR_X86 1
}  // namespace
#include <immintrin.h>
namespace {

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define CALR_NAMESPACE avx2
#define CALR_LANES 8
#include "dots.inl"
#undef CALR_NAMESPACE
#undef CALR_LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif
#define CALR_NAMESPACE avx512
#define CALR_LANES 16
#include "dots.inl"
#undef CALR_NAMESPACE
#undef CALR_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

enum Isa : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

Isa best_isa() {
#ifdef CALR_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kScalar;
}

Isa chosen = best_isa();

// out[m * out_stride + row] = weight[row] . x[m] for rows in [begin, end), in float32.
template <typename W>
void dots(const W* weight, const float* x, float* out, int64_t m, int64_t k, int64_t out_stride,
          int64_t begin, int64_t end) {
#ifdef CALR_X86
  if (chosen == kAvx512) return avx512::dots(weight, x, out, m, k, out_stride, begin, end);
  if (chosen == kAvx2) return avx2::dots(weight, x, out, m, k, out_stride, begin, end);
#endif
  scalar::dots(weight, x, out, m, k, out_stride, begin, end);
}

void dots_any(int32_t type, const void* weight, const float* x, float* out, int64_t m, int64_t k,
              int64_t out_stride, int64_t begin, int64_t end) {
  if (type == kFloat32) {
    dots(static_cast<const float*>(weight), x, out, m, k, out_stride, begin, end);
  } else if (type == kBFloat16) {
    dots(static_cast<const bfloat16*>(weight), x, out, m, k, out_stride, begin, end);
  } else {
    dots(static_cast<const float16*>(weight), x, out, m, k, out_stride, begin, end);
  }
}

template <typename X>
void widen_rows(const X* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen(x[i]);
}

void widen_any(int32_t type, const void* x, float* out, int64_t count) {
  if (type == kFloat32) {
    std::memcpy(out, x, count * sizeof(float));
  } else if (type == kBFloat16) {
    widen_rows(static_cast<const bfloat16*>(x), out, count);
  } else {
    widen_rows(static_cast<const float16*>(x), out, count);
  }
}

void store(int32_t type, float value, void* y, int64_t index) {
  if (type == kFloat32) {
    narrow(value, static_cast<float*>(y) + index);
  } else if (type == kBFloat16) {
    narrow(value, static_cast<bfloat16*>(y) + index);
  } else {
    narrow(value, static_cast<float16*>(y) + index);
  }
}

float load(int32_t type, const void* x, int64_t index) {
  if (type == kFloat32) return static_cast<const float*>(x)[index];
  if (type == kBFloat16) return widen(static_cast<const bfloat16*>(x)[index]);
  return widen(static_cast<const float16*>(x)[index]);
}

// Write into `others` the rows below n that are not pivots, ascending; false for bad pivots.
bool complement(const int32_t* pivots, int64_t n, int64_t r, std::vector<int32_t>& others) {
  others.assign(n, 1);
  for (int64_t i = 0; i < r; ++i) {
    if (pivots[i] < 0 || pivots[i] >= n || !others[pivots[i]]) return false;
    others[pivots[i]] = 0;
  }
  int64_t count = 0;
  for (int64_t row = 0; row < n; ++row) {
    const int32_t keep = others[row];
    others[count] = static_cast<int32_t>(row);
    count += keep;
  }
  return true;
}

template <typename Element>
void interleave(const Element* t, const Element* rest, const int32_t* pivots,
                const int32_t* others, Element* y, int64_t n, int64_t r, int64_t begin,
                int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    Element* out = y + row * n;
    for (int64_t i = 0; i < r; ++i) out[pivots[i]] = t[row * r + i];
    for (int64_t i = 0; i < n - r; ++i) out[others[i]] = rest[row * (n - r) + i];
  }
}

float rounded(int32_t type, float value) {  // through x's type and back
  char buffer[4];
  store(type, value, buffer, 0);
  return load(type, buffer, 0);
}

}  // namespace

extern "C" {

// The instruction set in use: 0 scalar, 1 AVX2, 2 AVX-512. select() refuses (-1) what is not there.
int32_t calr_isa() { return chosen; }

int32_t calr_select_isa(int32_t isa) {
  if (isa < kScalar || isa > best_isa()) return -1;
  chosen = static_cast<Isa>(isa);
  return 0;
}

// y [M, N] = up (down x) + bias. pivots == nullptr: up is [N, r]. Otherwise up is [N - r, r], the
// outputs listed in pivots [r] are down x itself and the others follow in ascending order.
// All arrays are contiguous; x and y have x_type, down and up weight_type, bias x_type or nullptr.
// Returns 0, or -1 for a pivot outside [0, N) or given twice (y is then unspecified).
int32_t calr_lowrank_linear(const void* x, const void* down, const void* up, const int32_t* pivots,
                            const void* bias, void* y, int64_t m, int64_t k, int64_t n, int64_t r,
                            int32_t x_type, int32_t weight_type, int32_t threads) {
  const int64_t rows = pivots ? n - r : n;
  thread_local std::vector<float> scratch;
  thread_local std::vector<int32_t> others;
  scratch.resize(m * (k + r + rows));
  float* wide = scratch.data();
  float* t = wide + m * k;
  float* out = t + m * r;
  if (pivots && !complement(pivots, n, r, others)) return -1;
  widen_any(x_type, x, wide, m * k);
  const int32_t* rest = others.data();
  calr::parallel(threads, r, k * m, [&](int64_t begin, int64_t end) {
    dots_any(weight_type, down, wide, t, m, k, r, begin, end);
    if (x_type != kFloat32) {
      for (int64_t row = 0; row < m; ++row) {
        for (int64_t i = begin; i < end; ++i) t[row * r + i] = rounded(x_type, t[row * r + i]);
      }
    }
  });
  calr::parallel(threads, rows, r * m, [&](int64_t begin, int64_t end) {
    dots_any(weight_type, up, t, out, m, r, rows, begin, end);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = pivots ? rest[i] : i;
        const float b = bias ? load(x_type, bias, column) : 0.0f;
        store(x_type, out[row * rows + i] + b, y, row * n + column);
      }
    }
  });
  if (pivots) {
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < r; ++i) {
        const float b = bias ? load(x_type, bias, pivots[i]) : 0.0f;
        store(x_type, t[row * r + i] + b, y, row * n + pivots[i]);
      }
    }
  }
  return 0;
}

// y [M, N]: t [M, r] at the columns pivots [r], rest [M, N - r] at the others in ascending order, for
// elements of 2 or 4 bytes. Returns 0, or -1 for bad pivots.
int32_t calr_interleave(const void* t, const void* rest, const int32_t* pivots, void* y, int64_t m,
                        int64_t n, int64_t r, int32_t element_size, int32_t threads) {
  std::vector<int32_t> others;
  if (!complement(pivots, n, r, others)) return -1;
  calr::parallel(threads, m, n, [&](int64_t begin, int64_t end) {
    if (element_size == 2) {
      interleave(static_cast<const uint16_t*>(t), static_cast<const uint16_t*>(rest), pivots,
                 others.data(), static_cast<uint16_t*>(y), n, r, begin, end);
    } else {
      interleave(static_cast<const uint32_t*>(t), static_cast<const uint32_t*>(rest), pivots,
                 others.data(), static_cast<uint32_t*>(y), n, r, begin, end);
    }
  });
  return 0;
}

}  // extern "C"
