// Low-rank, dense and quantised linear layers for small batches.
//
// Weights of 16 or 32 bits are read by rows where they are, all products dot products of contiguous
// rows, or in panels. Quantised ones come in panels. Either way every weight byte is read once, in order,
// and the cost is the memory traffic. Accumulation is in float32 in a fixed order (the same bits for any number of
// threads), and the rank-r intermediate rounds to x's type once.

#include "linear.h"

#include <cstdint>
#include <vector>

#include "bits.h"
#include "isa.h"

namespace {

using calr::room;
using calr::Team;

constexpr int64_t kUnit = 16;  // outputs: whole panels
constexpr int64_t kCorrectiveGroup = 32;
constexpr int64_t kFetched = 8192;  // bytes: half and twice as many gain less on a Zen 4

// Inputs x [m, k] of x_type's numbers, and what panels take in their place, made once by each thread.
class Prepared {
 public:
  void start(const float* x, int64_t m, int64_t k, int32_t x_type) {
    x_ = x, m_ = m, k_ = k, x_type_ = x_type, exact_ = x_type == kFloat32, used_ = 0, paired_ = false;
  }

  const float* x() const { return x_; }
  int64_t m() const { return m_; }
  int64_t k() const { return k_; }
  int32_t x_type() const { return x_type_; }

#ifdef CALR_PAIRS
  const uint32_t* pairs() {
    if (!paired_) {
      pairs_.resize(m_ * ((k_ + 1) / 2));
      avx512bf16::pair_up(x_, pairs_.data(), m_, k_);
      paired_ = true;
    }
    return pairs_.data();
  }
#endif

  // Call run(values, scales, offsets) with x in scale groups.
  template <typename Run>
  void in_groups(int64_t group, const Run& run) {
    const Entry& entry = find(group);
    if (exact_) {
      run(entry.floats.data(), entry.scales.data(), entry.offsets.data());
    } else {
      run(entry.integers.data(), entry.scales.data(), entry.offsets.data());
    }
  }

 private:
  struct Entry {
    int64_t group = 0;
    std::vector<float> floats, scales, last;
    std::vector<int16_t> integers;
    std::vector<int32_t> offsets;
  };

  const Entry& find(int64_t group) {
    for (size_t i = 0; i < used_; ++i) {
      if (entries_[i].group == group) return entries_[i];
    }
    if (used_ == entries_.size()) entries_.emplace_back();
    Entry& entry = entries_[used_++];
    const int64_t groups = (k_ + group - 1) / group, padded = groups * group;
    entry.group = group;
    entry.scales.resize(m_ * groups), entry.offsets.resize(2 * m_ * groups);
    entry.last.resize(group);
    if (exact_) {
      group_into(entry.floats, entry, m_ * padded);
    } else {
      group_into(entry.integers, entry, m_ * padded);
    }
    return entry;
  }

  template <typename X>
  void group_into(std::vector<X>& values, Entry& entry, int64_t size) {
    values.resize(size);
    CALR_BY_ISA(group_inputs, x_, values.data(), entry.scales.data(), entry.offsets.data(), m_, k_, entry.group,
                entry.last.data());
  }

  const float* x_;
  int64_t m_, k_;
  int32_t x_type_;
  bool exact_, paired_;
  size_t used_ = 0;
  std::vector<uint32_t> pairs_;
  std::vector<Entry> entries_;
};

bool pivoted(const calr_layer& layer) { return layer.r && layer.pivots; }

// How many terms of the corrective path are products with rows of numbers.
int64_t plain_terms(const calr_layer& layer) { return layer.packed_corrective ? 0 : layer.c; }

int64_t rows_of(const calr_layer& layer) { return pivoted(layer) ? layer.n - layer.r : layer.n; }

// out [m, stride]: rows [begin, end) of a layer's matrix weight [rows, k] times what was prepared.
void products(const calr_layer& layer, const void* weight, Prepared& prepared, float* out, int64_t stride,
              int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t m = prepared.m(), k = prepared.k();
#ifdef CALR_PAIRS
  const bool narrow = layer.type == kBFloat16 && prepared.x_type() == kBFloat16;
  if (layer.packed && narrow && calr::chosen == calr::kAvx512BFloat16) {
    avx512bf16::pair_products(static_cast<const bfloat16*>(weight), prepared.pairs(), out, m, (k + 1) / 2,
                              stride, begin, end);
    return;
  }
#endif
  typed(layer.type, [&](auto w) {
    const auto* numbers = static_cast<const decltype(w)*>(weight);
    if (layer.packed) {
      CALR_BY_ISA(number_products, numbers, prepared.x(), out, m, k, stride, begin, end);
    } else {
      CALR_BY_ISA(dots, numbers, prepared.x(), out, m, k, stride, begin, end);
    }
  });
}

// out [m, stride]: panels of rows [begin, end) times what was prepared.
void panel_products(Prepared& prepared, const void* panels, const int8_t* table, int32_t bits,
                    int64_t group, int64_t k, float* out, int64_t m, int64_t stride, int64_t begin,
                    int64_t end) {
  if (begin >= end) return;
  prepared.in_groups(group, [&](const auto* values, const float* scales, const int32_t* offsets) {
    of_bits(bits, [&](auto constant) {
      CALR_BY_ISA(panels_products<decltype(constant)::value>, static_cast<const uint8_t*>(panels), table,
                  values, scales, offsets, out, m, (k + group - 1) / group, group, stride, begin / kUnit,
                  (end + kUnit - 1) / kUnit);
    });
  });
}

// Rows [begin, end) of a quantised layer with its corrective path, whose terms t [m, c] are known unless it
// is packed.
void quantized(const calr_layer& layer, Prepared& prepared, int64_t m, int64_t k, int32_t x_type,
               const float* known, float* out, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t stride = room(layer.n), c = layer.c;
  panel_products(prepared, layer.panels, layer.table, layer.bits, layer.group, k, out, m, stride, begin,
                 end);
  if (!c) return;
  thread_local std::vector<float> buffer;
  if (!layer.packed_corrective) {
    const int64_t width = end - begin;
    buffer.resize(m * width);
    typed(layer.type, [&](auto w) {
      const auto* up = static_cast<const decltype(w)*>(layer.corrective_up) + begin;
      CALR_BY_ISA(combine, known, c, m, up, buffer.data(), width, c, width, layer.n);
    });
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < width; ++i) out[row * stride + begin + i] += buffer[row * width + i];
    }
    return;
  }
  buffer.resize(m * room(c) + c);
  float *t = buffer.data(), *weights = t + m * room(c);
  panel_products(prepared, layer.corrective_down, layer.table, 8, kCorrectiveGroup, k, t, m, room(c), 0, c);
  calr::round_to(x_type, t, m * room(c));
  for (int64_t row = 0; row < m; ++row) {
    CALR_BY_ISA(add_terms, static_cast<const uint8_t*>(layer.corrective_up), t + row * room(c),
                out + row * stride + begin, c, begin, end - begin, weights);
  }
}

// Put values [m, stride], of outputs [begin, end) of `places`, where they belong.
void place(const calr_layer& layer, const int32_t* places, const float* values, int64_t stride,
           int64_t m, float* out, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < m; ++row) {
    float* own = out + row * room(layer.n);
    for (int64_t i = begin; i < end; ++i) own[places[i]] = values[row * stride + i];
  }
}

// The second factor of a low-rank layer, or all of a dense one, for this thread's part of the rows.
void second(const calr_layer& layer, const Team& team, Prepared& prepared, float* out, float* scratch) {
  thread_local Prepared between;
  const int64_t m = prepared.m(), rows = rows_of(layer), r = layer.r, c = layer.c;
  const auto [begin, end] = team.part(rows, kUnit);
  const float *t = scratch, *corrective_t = scratch + m * r;
  float* rest = scratch + m * (r + c);
  float* to = pivoted(layer) || c ? rest : out;
  const int64_t stride = room(rows);
  if (r) between.start(t, m, r, prepared.x_type());
  products(layer, layer.up, r ? between : prepared, pivoted(layer) ? rest : out, stride, begin, end);
  if (c) {
    between.start(corrective_t, m, c, prepared.x_type());
    products(layer, layer.corrective_up, between, to, stride, begin, end);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = begin; i < end; ++i) out[row * stride + i] += to[row * stride + i];
    }
  }
  if (pivoted(layer)) {
    place(layer, layer.others, rest, stride, m, out, begin, end);
    const auto [first, last] = team.part(r, kUnit);
    place(layer, layer.pivots, t, r, m, out, first, last);
  }
}

// Add biases and round this thread's part of the outputs.
void finish(const calr_layer& layer, const Team& team, int64_t m, int32_t x_type, float* out) {
  const auto [begin, end] = team.part(layer.n, kUnit);
  for (int64_t row = 0; row < m; ++row) {
    float* own = out + row * room(layer.n);
    if (layer.bias) {
      typed(x_type, [&](auto x) {
        const auto* bias = static_cast<const decltype(x)*>(layer.bias);
        for (int64_t i = begin; i < end; ++i) own[i] += widen(bias[i]);
      });
    }
    calr::round_to(x_type, own + begin, end - begin);
  }
}

}  // namespace

int64_t calr::scratch_of(const calr_layer& layer) {
  const int64_t first = layer.r + plain_terms(layer);
  return first ? first + (layer.panels ? 0 : room(rows_of(layer))) : 0;
}

int64_t calr::weights_of(const calr_layer& layer, int64_t k) {
  if (!layer.r) return (layer.n + layer.c) * k + layer.n * layer.c;
  return (layer.r + layer.c) * k + rows_of(layer) * (layer.r + layer.c);
}

void calr::fetch(const Team& team, const calr_layer& layer, int64_t k) {
  const bool down = layer.r && !layer.panels;
  const int64_t begin = team.part(down ? layer.r : rows_of(layer), kUnit).first;
  int64_t row = k * (layer.type == kFloat32 ? 4 : 2);
  if (layer.panels) row = (k + layer.group - 1) / layer.group * (2 + layer.group * layer.bits / 8);
  const auto* at = static_cast<const char*>(layer.panels ? layer.panels : down ? layer.down : layer.up);
  for (int64_t i = 0; i < kFetched; i += 64) __builtin_prefetch(at + begin * row + i, 0, 2);
}

void calr::round_to(int32_t x_type, float* values, int64_t count) {
  if (x_type == kFloat32) return;
  typed(x_type, [&](auto x) { CALR_BY_ISA(round_all<decltype(x)>, values, count); });
}

void calr::multiply(const Team& team, const calr_layer* layers, int64_t count, const float* x,
                    int64_t m, int64_t k, int32_t x_type, float* const* outs, float* scratch) {
  thread_local Prepared prepared;
  prepared.start(x, m, k, x_type);
  bool two_steps = false, scattered = false;
  float* at = scratch;
  for (int64_t i = 0; i < count; ++i) {
    const calr_layer& layer = layers[i];
    if (layer.r || plain_terms(layer)) {
      two_steps = true, scattered |= pivoted(layer);
      float* steps[2] = {at, at + m * layer.r};
      const void* downs[2] = {layer.down, layer.corrective_down};
      const int64_t ranks[2] = {layer.r, plain_terms(layer)};
      for (int step = 0; step < 2; ++step) {
        const auto [begin, end] = team.part(ranks[step], layer.packed ? kUnit : 8);
        products(layer, downs[step], prepared, steps[step], ranks[step], begin, end);
        for (int64_t row = 0; row < m; ++row) {
          round_to(x_type, steps[step] + row * ranks[step] + begin, end - begin);
        }
      }
    }
    at += m * scratch_of(layer);
  }
  if (two_steps) team.wait();
  at = scratch;
  for (int64_t i = 0; i < count; ++i) {
    const calr_layer& layer = layers[i];
    if (layer.panels) {
      const auto [begin, end] = team.part(layer.n, kUnit);
      quantized(layer, prepared, m, k, x_type, at, outs[i], begin, end);
    } else {
      second(layer, team, prepared, outs[i], at);
    }
    at += m * scratch_of(layer);
  }
  if (scattered) team.wait();
  for (int64_t i = 0; i < count; ++i) finish(layers[i], team, m, x_type, outs[i]);
}

void calr_linears(const void* x, const calr_layer* layers, int64_t count, void* const* ys, int64_t m,
                  int64_t k, int32_t x_type, int32_t threads) {
  thread_local std::vector<float> buffer;
  thread_local std::vector<float*> outs;
  int64_t size = k, operations = 0;
  for (int64_t i = 0; i < count; ++i) {
    size += calr::scratch_of(layers[i]) + room(layers[i].n);
    operations += m * calr::weights_of(layers[i], k);
  }
  buffer.resize(m * size);
  outs.clear();
  float *wide = buffer.data(), *at = wide + m * k;
  for (int64_t i = 0; i < count; ++i, at += m * room(layers[i - 1].n)) outs.push_back(at);
  float* const* results = outs.data();
  typed(x_type, [&](auto value) {
    using X = decltype(value);
    for (int64_t i = 0; i < m * k; ++i) wide[i] = widen(static_cast<const X*>(x)[i]);
    calr::together(calr::useful(threads, operations), [&](const Team& team) {
      calr::multiply(team, layers, count, wide, m, k, x_type, results, at);
      for (int64_t i = 0; i < count; ++i) {
        const auto [begin, end] = team.part(layers[i].n, kUnit);
        for (int64_t row = 0; row < m; ++row) {
          const float* from = results[i] + row * room(layers[i].n);
          X* to = static_cast<X*>(ys[i]) + row * layers[i].n;
          CALR_BY_ISA(narrow_all, from + begin, to + begin, end - begin);
        }
      }
    });
  });
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
  calr_layer layer{};
  layer.down = down, layer.up = up, layer.pivots = pivots, layer.others = others.data();
  layer.corrective_down = corrective_down, layer.corrective_up = corrective_up, layer.bias = bias;
  layer.n = n, layer.r = r, layer.c = c, layer.type = weight_type;
  calr_linears(x, &layer, 1, &y, m, k, x_type, threads);
  return 0;
}
