// The instruction sets: every loop of loops.inl compiled for AVX-512, AVX2 and scalar code, those of
// pairs.inl for AVX-512 with instructions for bfloat16, and the choice between them, made once at run time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CALR_X86 1
#if defined(__clang__)
#include <immintrin.h>
#else  // GCC 12 and older warn about their own header wherever it is inlined
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#endif

namespace {

#define CALR_NAMESPACE scalar
#define CALR_LANES 4
#include "loops.inl"
#undef CALR_NAMESPACE
#undef CALR_LANES

#ifdef CALR_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define CALR_NAMESPACE avx2
#define CALR_LANES 8
#include "loops.inl"
#undef CALR_NAMESPACE
#undef CALR_LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#endif
#define CALR_NAMESPACE avx512
#define CALR_LANES 16
#include "loops.inl"
#undef CALR_NAMESPACE
#undef CALR_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10  // older ones do not know bfloat16
#define CALR_PAIRS 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bf16")
#endif
namespace avx512bf16 {
using avx512::in_tiles;
using avx512::kPanel;
#include "pairs.inl"
}  // namespace avx512bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif

}  // namespace

namespace calr {

enum Isa : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512BFloat16 = 3 };

extern Isa chosen;  // the best that this machine has, unless calr_select_isa says otherwise

}  // namespace calr

// The function of that name of the instruction set in use. A macro, since a namespace is no argument of
// a template.
#ifdef CALR_X86
#define CALR_BY_ISA(function, ...)                                            \
  (calr::chosen >= calr::kAvx512 ? avx512::function(__VA_ARGS__)              \
   : calr::chosen == calr::kAvx2 ? avx2::function(__VA_ARGS__)                \
                                 : scalar::function(__VA_ARGS__))
#else
#define CALR_BY_ISA(function, ...) scalar::function(__VA_ARGS__)
#endif
