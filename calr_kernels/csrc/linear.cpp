// Low-rank and dense linear layers for small batches on a CPU, behind a C interface.
//
// y = up (down x) + corrective_up (corrective_down x) + bias, x [M, K]. All products are dot products
// of contiguous weight rows, so every weight byte is read once, in order, and nothing is packed: the
// cost is the memory traffic. Several layers of one input run as one. Weights are float32, bfloat16
// or float16, accumulation is float32 in a fixed order (the same bits for any number of threads), and
// the intermediate rounds to x's type once. The instruction set is chosen at run time.

#include <algorithm>
#include <cmath>
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

enum Isa : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

Isa best_isa() {
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
  typed(type, [&](auto w) {
    dots(static_cast<const decltype(w)*>(weight), x, out, m, k, out_stride, begin, end);
  });
}

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

// In place: SiLU x / (1 + exp(-x)), or GELU by tanh, which is x times a sigmoid too.
void activate_any(int32_t activation, float* values, int64_t count) {
#ifdef CALR_X86
  if (chosen == kAvx512) return avx512::activate(activation, values, count);
  if (chosen == kAvx2) return avx2::activate(activation, values, count);
#endif
  scalar::activate(activation, values, count);
}

void widen_any(int32_t type, const void* x, float* out, int64_t count) {
  typed(type, [&](auto value) {
    const auto* in = static_cast<const decltype(value)*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = widen(in[i]);
  });
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

}  // namespace

extern "C" {

// One layer. r == 0: dense, up is the weight [n, K]. Otherwise down [r, K], and without pivots
// up [n, r], optionally corrective_down [c, K] and corrective_up [n, c]. With pivots [r] and others
// [n - r], ascending: up [n - r, r] gives the outputs `others`, the others are down x itself.
struct calr_layer {
  const void *down, *up, *corrective_down, *corrective_up, *bias;
  const int32_t *pivots, *others;
  int64_t n, r, c;
};
}

namespace {

// Rows [0, rows) of a weight [rows, k], and of a second one [rows, extra_k] whose products add up.
struct Segment {
  const calr_layer* layer;
  const void *weight, *extra;
  const float *input, *extra_input;
  float *out, *extra_out;  // [M, stride]
  int64_t rows, k, extra_k, stride;
  void* y;  // where the outputs go; nullptr: they stay in `out`, rounded to x's type
};

struct Call {
  int64_t m;
  int32_t x_type, weight_type, threads;
};

// Put values [begin, end) of one row in their places, value i at places[i], or at i without.
template <typename X>
void place(const float* values, const float* extra, const void* bias, const int32_t* places, X* y,
           int64_t begin, int64_t end) {
  const X* biases = static_cast<const X*>(bias);
  if (!extra && !bias && !places) {
    for (int64_t i = begin; i < end; ++i) narrow(values[i], y + i);
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = places ? places[i] : i;
    float value = values[i];
    if (extra) value += extra[i];
    if (bias) value += widen(biases[column]);
    narrow(value, y + column);
  }
}

template <typename X>
void write(const Call& call, const Segment& s, int64_t begin, int64_t end) {
  const calr_layer& layer = *s.layer;
  for (int64_t row = 0; row < call.m; ++row) {
    float* out = s.out + row * s.stride;
    if (!s.y) {
      for (int64_t i = begin; i < end; ++i) out[i] = rounded<X>(out[i]);
      continue;
    }
    const float* extra = s.extra ? s.extra_out + row * s.stride : nullptr;
    const int32_t* places = layer.r && layer.pivots ? layer.others : nullptr;
    place(out, extra, layer.bias, places, static_cast<X*>(s.y) + row * layer.n, begin, end);
  }
}

// Run all rows of all segments, split into parts of similar cost.
void run(const Call& call, const std::vector<Segment>& segments) {
  int64_t total = 0;
  for (const Segment& s : segments) total += s.rows * (s.k + s.extra_k);
  calr::parallel(call.threads, total, call.m, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (const Segment& s : segments) {
      const int64_t cost = s.k + s.extra_k;
      auto row_at = [&](int64_t position) {
        return std::clamp<int64_t>((position - start + cost - 1) / cost, 0, s.rows);
      };
      const int64_t first = begin <= start ? 0 : row_at(begin), last = row_at(end);
      if (end > start && first < last) {
        dots_any(call.weight_type, s.weight, s.input, s.out, call.m, s.k, s.stride, first, last);
        if (s.extra) {
          dots_any(call.weight_type, s.extra, s.extra_input, s.extra_out, call.m, s.extra_k,
                   s.stride, first, last);
        }
        typed(call.x_type, [&](auto x) { write<decltype(x)>(call, s, first, last); });
      }
      start += s.rows * cost;
    }
  });
}

int64_t rows_of(const calr_layer& layer) {
  return layer.r && layer.pivots ? layer.n - layer.r : layer.n;
}

int64_t scratch_of(const calr_layer& layer) {
  return layer.r + layer.c + rows_of(layer) * (layer.c ? 2 : 1);
}

// ys[i] = layer i of wide x [M, K]. scratch: M times the sum of scratch_of.
void linears(const Call& call, const float* x, int64_t k, const calr_layer* layers, int64_t count,
             void* const* ys, float* scratch) {
  thread_local std::vector<Segment> first, second;
  first.clear();
  second.clear();
  auto take = [&](int64_t columns) {
    float* taken = scratch;
    scratch += call.m * columns;
    return taken;
  };
  for (int64_t i = 0; i < count; ++i) {
    const calr_layer& layer = layers[i];
    const int64_t rows = rows_of(layer);
    float* out = take(rows);
    if (!layer.r) {
      first.push_back({&layer, layer.up, nullptr, x, nullptr, out, nullptr, rows, k, 0, rows, ys[i]});
      continue;
    }
    float* t = take(layer.r);
    first.push_back(
        {&layer, layer.down, nullptr, x, nullptr, t, nullptr, layer.r, k, 0, layer.r, nullptr});
    Segment up{&layer, layer.up, nullptr, t, nullptr, out, nullptr, rows, layer.r, 0, rows, ys[i]};
    if (layer.c) {
      float* corrective = take(layer.c);
      first.push_back({&layer, layer.corrective_down, nullptr, x, nullptr, corrective, nullptr,
                       layer.c, k, 0, layer.c, nullptr});
      up.extra = layer.corrective_up;
      up.extra_input = corrective;
      up.extra_out = take(rows);
      up.extra_k = layer.c;
    }
    if (rows) second.push_back(up);
  }
  run(call, first);
  if (!second.empty()) run(call, second);
  for (const Segment& s : first) {
    const calr_layer& layer = *s.layer;
    if (!layer.r || !layer.pivots) continue;
    typed(call.x_type, [&](auto value) {
      auto* y = static_cast<decltype(value)*>(ys[&layer - layers]);
      for (int64_t row = 0; row < call.m; ++row) {
        place(s.out + row * layer.r, nullptr, layer.bias, layer.pivots, y + row * layer.n, 0, layer.r);
      }
    });
  }
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

// Write into others [n - r] the rows that are not among pivots [r], ascending.
// Returns 0, or -1 for a pivot outside [0, n) or given twice.
int32_t calr_complement(const int32_t* pivots, int32_t* others, int64_t n, int64_t r) {
  std::vector<int32_t> found;
  if (!complement(pivots, n, r, found)) return -1;
  std::copy(found.begin(), found.begin() + (n - r), others);
  return 0;
}

// ys[i] [M, n_i] = layers[i] of x [M, K]. Arrays are contiguous; x, y and bias have x_type, all
// weights weight_type.
void calr_linears(const void* x, const calr_layer* layers, int64_t count, void* const* ys, int64_t m,
                  int64_t k, int32_t x_type, int32_t weight_type, int32_t threads) {
  thread_local std::vector<float> buffer;
  int64_t size = k;
  for (int64_t i = 0; i < count; ++i) size += scratch_of(layers[i]);
  buffer.resize(m * size);
  widen_any(x_type, x, buffer.data(), m * k);
  linears({m, x_type, weight_type, threads}, buffer.data(), k, layers, count, ys,
          buffer.data() + m * k);
}

// One layer given by its parts, `others` found here. Returns 0, or -1 for bad pivots.
int32_t calr_lowrank_linear(const void* x, const void* down, const void* up, const int32_t* pivots,
                            const void* bias, const void* corrective_down, const void* corrective_up,
                            void* y, int64_t m, int64_t k, int64_t n, int64_t r, int64_t c,
                            int32_t x_type, int32_t weight_type, int32_t threads) {
  thread_local std::vector<int32_t> others;
  if (pivots && !complement(pivots, n, r, others)) return -1;
  const calr_layer layer{down,   up,            corrective_down, corrective_up, bias,
                         pivots, others.data(), n,               r,             c};
  calr_linears(x, &layer, 1, &y, m, k, x_type, weight_type, threads);
  return 0;
}

// y = layers[2] (act(layers[0] x) * layers[1] x): a gated feed-forward block. Every intermediate
// rounds to x's type where separate operations would. activation: 0 SiLU, 1 GELU by tanh.
void calr_gated(const void* x, const calr_layer* layers, void* y, int64_t m, int64_t k,
                int32_t activation, int32_t x_type, int32_t weight_type, int32_t threads) {
  thread_local std::vector<float> buffer;
  thread_local std::vector<char> outputs;
  const int64_t hidden = layers[0].n, bytes = m * hidden * 4;
  const int64_t size =
      std::max(k, hidden) +
      std::max(scratch_of(layers[0]) + scratch_of(layers[1]), scratch_of(layers[2]));
  buffer.resize(m * size);
  outputs.resize(2 * bytes);
  void* ys[2] = {outputs.data(), outputs.data() + bytes};
  const Call call{m, x_type, weight_type, threads};
  float* wide = buffer.data();
  float* scratch = wide + m * std::max(k, hidden);
  widen_any(x_type, x, wide, m * k);
  linears(call, wide, k, layers, 2, ys, scratch);
  float* gate = scratch;  // its contents are no longer needed
  widen_any(x_type, ys[0], gate, m * hidden);
  widen_any(x_type, ys[1], wide, m * hidden);
  activate_any(activation, gate, m * hidden);
  typed(x_type, [&](auto value) {
    using X = decltype(value);
    for (int64_t i = 0; i < m * hidden; ++i) {
      wide[i] = rounded<X>(rounded<X>(gate[i]) * wide[i]);
    }
  });
  linears(call, wide, hidden, layers + 2, 1, &y, scratch);
}

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
