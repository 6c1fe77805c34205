// Low-rank and dense linear layers for small batches.
//
// y = up (down x) + corrective_up (corrective_down x) + bias, x [M, K]. All products are dot products
// of contiguous weight rows, so every weight byte is read once, in order, and nothing is packed: the
// cost is the memory traffic. Several layers of one input run as one. Weights are float32, bfloat16
// or float16, accumulation is float32 in a fixed order (the same bits for any number of threads), and
// the intermediate rounds to x's type once.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "calr.h"
#include "isa.h"
#include "pool.h"

namespace {

// What all products of one call share.
struct Call {
  int64_t m;
  int32_t x_type, weight_type, threads;
};

// out [M, rows] = the rows of weight [rows, k] times input [M, k].
struct Product {
  const void* weight = nullptr;
  const float* input = nullptr;
  float* out = nullptr;
  int64_t k = 0;
};

// A product, and a second one of as many rows that adds to it (if it has a weight). What comes out goes
// into y, or is the input of later products, or both.
struct Segment {
  int64_t rows;
  Product product, added;
  bool intermediate;      // an input: rounded to x's type in place, put into y last
  void* y;                // [M, n]; nullptr: not an output
  int64_t n;
  const int32_t* places;  // output i is column places[i] of y; nullptr: column i
  const void* bias;       // [n] or nullptr

  int64_t cost() const { return product.k + added.k; }  // per row
};

void widen_all(int32_t type, const void* x, float* out, int64_t count) {
  typed(type, [&](auto value) {
    const auto* in = static_cast<const decltype(value)*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = widen(in[i]);
  });
}

void multiply(const Call& call, const Product& product, int64_t rows, int64_t begin, int64_t end) {
  typed(call.weight_type, [&](auto w) {
    CALR_BY_ISA(dots, static_cast<const decltype(w)*>(product.weight), product.input, product.out, call.m,
                product.k, rows, begin, end);
  });
}

// Put outputs [begin, end) of one row of a segment in their places in y.
template <typename X>
void place(const Segment& s, int64_t row, int64_t begin, int64_t end) {
  const float* values = s.product.out + row * s.rows;
  const float* added = s.added.weight ? s.added.out + row * s.rows : nullptr;
  const X* bias = static_cast<const X*>(s.bias);
  const int32_t* places = s.places;
  X* y = static_cast<X*>(s.y) + row * s.n;
  if (!added && !bias && !places) {
    for (int64_t i = begin; i < end; ++i) narrow(values[i], y + i);
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = places ? places[i] : i;
    float value = values[i];
    if (added) value += added[i];
    if (bias) value += widen(bias[column]);
    narrow(value, y + column);
  }
}

template <typename X>
void finish(const Segment& s, int64_t row, int64_t begin, int64_t end) {
  if (!s.intermediate) return place<X>(s, row, begin, end);
  float* out = s.product.out + row * s.rows;
  for (int64_t i = begin; i < end; ++i) out[i] = rounded<X>(out[i]);
}

// Run all rows of all segments, split into parts of similar cost.
void run(const Call& call, const std::vector<Segment>& segments) {
  int64_t total = 0;
  for (const Segment& s : segments) total += s.rows * s.cost();
  calr::parallel(call.threads, total, call.m, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (const Segment& s : segments) {
      const int64_t cost = s.cost();
      auto row_at = [&](int64_t position) {
        return std::clamp<int64_t>((position - start + cost - 1) / cost, 0, s.rows);
      };
      const int64_t first = begin <= start ? 0 : row_at(begin), last = row_at(end);
      if (end > start && first < last) {
        multiply(call, s.product, s.rows, first, last);
        if (s.added.weight) multiply(call, s.added, s.rows, first, last);
        typed(call.x_type, [&](auto x) {
          for (int64_t row = 0; row < call.m; ++row) finish<decltype(x)>(s, row, first, last);
        });
      }
      start += s.rows * cost;
    }
  });
}

bool pivoted(const calr_layer& layer) { return layer.r && layer.pivots; }

int64_t rows_of(const calr_layer& layer) { return pivoted(layer) ? layer.n - layer.r : layer.n; }

int64_t scratch_of(const calr_layer& layer) {
  return layer.r + layer.c + rows_of(layer) * (layer.c ? 2 : 1);
}

// Add what makes y of wide x [M, K]: to `first` the products with x, to `second` those with what the first
// ones leave in scratch [M * scratch_of(layer)]. Returns where the scratch ends.
float* plan(const Call& call, const float* x, int64_t k, const calr_layer& layer, void* y,
            float* scratch, std::vector<Segment>& first, std::vector<Segment>& second) {
  auto take = [&](int64_t columns) {
    float* taken = scratch;
    scratch += call.m * columns;
    return taken;
  };
  const int64_t rows = rows_of(layer), n = layer.n, r = layer.r, c = layer.c;
  float* out = take(rows);
  if (!r) {
    first.push_back({rows, {layer.up, x, out, k}, {}, false, y, n, nullptr, layer.bias});
    return scratch;
  }
  const bool pivots = pivoted(layer);
  float* t = take(r);
  first.push_back({r, {layer.down, x, t, k}, {}, true, pivots ? y : nullptr, n, layer.pivots, layer.bias});
  Product corrective;
  if (c) {
    float* corrective_t = take(c);
    const Product down{layer.corrective_down, x, corrective_t, k};
    first.push_back({c, down, {}, true, nullptr, n, nullptr, nullptr});
    corrective = {layer.corrective_up, corrective_t, take(rows), c};
  }
  if (rows) {
    const int32_t* places = pivots ? layer.others : nullptr;
    second.push_back({rows, {layer.up, t, out, r}, corrective, false, y, n, places, layer.bias});
  }
  return scratch;
}

}  // namespace

void calr_linears(const void* x, const calr_layer* layers, int64_t count, void* const* ys, int64_t m,
                  int64_t k, int32_t x_type, int32_t weight_type, int32_t threads) {
  thread_local std::vector<float> buffer;
  thread_local std::vector<Segment> first, second;
  int64_t size = k;
  for (int64_t i = 0; i < count; ++i) size += scratch_of(layers[i]);
  buffer.resize(m * size);
  first.clear();
  second.clear();
  const Call call{m, x_type, weight_type, threads};
  float *wide = buffer.data(), *scratch = wide + m * k;
  widen_all(x_type, x, wide, m * k);
  for (int64_t i = 0; i < count; ++i) {
    scratch = plan(call, wide, k, layers[i], ys[i], scratch, first, second);
  }
  run(call, first);
  if (!second.empty()) run(call, second);
  for (const Segment& s : first) {  // pivots; among the rest above, threads would share lines of y
    if (!s.intermediate || !s.y) continue;
    typed(x_type, [&](auto value) {
      for (int64_t row = 0; row < m; ++row) place<decltype(value)>(s, row, 0, s.rows);
    });
  }
}

int32_t calr_lowrank_linear(const void* x, const void* down, const void* up, const int32_t* pivots,
                            const void* bias, const void* corrective_down, const void* corrective_up,
                            void* y, int64_t m, int64_t k, int64_t n, int64_t r, int64_t c,
                            int32_t x_type, int32_t weight_type, int32_t threads) {
  thread_local std::vector<int32_t> others;
  if (pivots) {
    others.resize(n);
    if (calr_complement(pivots, others.data(), n, r)) return -1;
  }
  const calr_layer layer{down,   up,            corrective_down, corrective_up, bias,
                         pivots, others.data(), n,               r,             c};
  calr_linears(x, &layer, 1, &y, m, k, x_type, weight_type, threads);
  return 0;
}
