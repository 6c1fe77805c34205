// The element types, and every loop compiled for each instruction set: AVX-512, AVX2, scalar. Which
// of them runs is chosen once, at run time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

template <typename X>
inline float rounded(float value) {  // to X and back
  X narrowed;
  narrow(value, &narrowed);
  return widen(narrowed);
}

// Call run with a value of the type that a code stands for.
template <typename Run>
void typed(int32_t type, const Run& run) {
  if (type == kFloat32) {
    run(float{});
  } else if (type == kBFloat16) {
    run(bfloat16{});
  } else {
    run(float16{});
  }
}

constexpr int64_t SHORT_ROW = 2560;  // bytes

// One implementation per instruction set.
#define CALR_NAMESPACE scalar
#define CALR_LANES 4
#include "dots.inl"
#undef CALR_NAMESPACE
#undef CALR_LANES

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CALR_X86 1
}  // namespace
#include <cpuid.h>
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

}  // namespace

namespace calr {

enum Isa : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

inline Isa best_isa() {
#ifdef CALR_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  unsigned a, b, c = 0, d;  // older compilers know no "f16c"
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) return kAvx2;
#endif
  return kScalar;
}

inline Isa chosen = best_isa();

}  // namespace calr
