// Low-rank and dense linear layers for small batches on a CPU, behind a C interface.
//
// y = up (down x) + corrective_up (corrective_down x) + bias, x [M, K]. All products are dot products
// of contiguous weight rows, so every weight byte is read once, in order, and nothing is packed: the
// cost is the memory traffic. Several layers of one input run as one. Weights are float32, bfloat16
// or float16, accumulation is float32 in a fixed order (the same bits for any number of threads), and
// the intermediate rounds to x's type once.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace {

using calr::chosen, calr::kAvx2, calr::kAvx512;

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
int32_t calr_isa() { return calr::chosen; }

int32_t calr_select_isa(int32_t isa) {
  if (isa < calr::kScalar || isa > calr::best_isa()) return -1;
  calr::chosen = static_cast<calr::Isa>(isa);
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
