// Runs the native kernel over awkward shapes in exactly sized heap buffers, for sanitizers to watch,
// and compares float32 results with sums in double. Prints what differs; exit status 1 then.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "../../calr_kernels/csrc/calr.h"
#include "../../calr_kernels/csrc/team.h"
#include "../../calr_kernels/csrc/types.h"

namespace {

std::mt19937 generator(0);
int failures = 0;

void store(int32_t type, float value, void* y, int64_t index) {
  typed(type, [&](auto x) { narrow(value, static_cast<decltype(x)*>(y) + index); });
}

float load(int32_t type, const void* x, int64_t index) {
  float value = 0;
  typed(type, [&](auto element) {
    value = widen(static_cast<const decltype(element)*>(x)[index]);
  });
  return value;
}

// `count` values of a type, in a buffer of exactly their size.
struct Array {
  int32_t type;
  std::vector<char> bytes;
  Array(int32_t type, int64_t count) : type(type), bytes(count * (type == kFloat32 ? 4 : 2)) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int64_t i = 0; i < count; ++i) store(type, uniform(generator), bytes.data(), i);
  }
  const void* data() const { return bytes.data(); }
  void* data() { return bytes.data(); }
  double operator[](int64_t i) const { return load(type, bytes.data(), i); }
};

double dot(const Array& w, int64_t row, const std::vector<double>& x) {
  double total = 0;
  for (size_t i = 0; i < x.size(); ++i) total += w[row * x.size() + i] * x[i];
  return total;
}

void expect(double found, double wanted, double tolerance, const char* what) {
  if (!(std::fabs(found - wanted) <= tolerance * (1 + std::fabs(wanted)))) {
    if (++failures < 10) std::printf("%s: %g instead of %g\n", what, found, wanted);
  }
}

void layer(int32_t x_type, int32_t type, int64_t m, int64_t k, int64_t n, int64_t r, int64_t c,
           bool pivoted) {
  const double tolerance = x_type == kFloat32 ? 1e-5 : x_type == kFloat16 ? 4e-3 : 4e-2;
  const int64_t rows = pivoted ? n - r : n;
  Array x(x_type, m * k), down(type, r * k), up(type, rows * r), bias(x_type, n), y(x_type, m * n);
  Array corrective_down(type, c * k), corrective_up(type, n * c);
  std::vector<int32_t> pivots, others;
  for (int32_t i = 0; i < n; ++i) {
    (pivoted && static_cast<int64_t>(pivots.size()) < r && i % 2 == 0 ? pivots : others).push_back(i);
  }
  while (pivoted && static_cast<int64_t>(pivots.size()) < r) {
    pivots.push_back(others.back());
    others.pop_back();
  }
  const int32_t status = calr_lowrank_linear(
      x.data(), down.data(), up.data(), pivoted ? pivots.data() : nullptr, bias.data(),
      c ? corrective_down.data() : nullptr, c ? corrective_up.data() : nullptr, y.data(), m, k, n, r,
      c, x_type, type, 3);
  expect(status, 0, 0, "status");
  for (int64_t row = 0; row < m; ++row) {
    std::vector<double> in(k), t(r), extra(c);
    for (int64_t i = 0; i < k; ++i) in[i] = x[row * k + i];
    for (int64_t i = 0; i < r; ++i) t[i] = dot(down, i, in);
    for (int64_t i = 0; i < c; ++i) extra[i] = dot(corrective_down, i, in);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t column = pivoted ? others[i] : i;
      double wanted = dot(up, i, t) + bias[column];
      if (c) wanted += dot(corrective_up, i, extra);
      expect(y[row * n + column], wanted, tolerance * (r + 1), "row");
    }
    for (size_t i = 0; i < pivots.size(); ++i) {
      expect(y[row * n + pivots[i]], t[i] + bias[pivots[i]], tolerance * (r + 1), "pivot");
    }
  }
}

void norm(int32_t type, int64_t m, int64_t k) {
  Array x(type, m * k), weight(type, k), y(type, m * k);
  calr_rms_norm(x.data(), weight.data(), y.data(), m, k, 1e-5f, type, 3);
  for (int64_t row = 0; row < m; ++row) {
    double squares = 0;
    for (int64_t i = 0; i < k; ++i) squares += x[row * k + i] * x[row * k + i];
    const double scale = 1 / std::sqrt(squares / k + 1e-5);
    for (int64_t i = 0; i < k; ++i) {
      const double tolerance = type == kFloat32 ? 1e-6 : 1e-2;
      expect(y[row * k + i], x[row * k + i] * scale * weight[i], tolerance, "norm");
    }
  }
}

void attention(int32_t type, int64_t b, int64_t heads, int64_t group, int64_t count, int64_t d) {
  Array q(type, b * heads * group * d), turned(q), cosines(type, b * d), sines(type, b * d);
  calr_rotate(turned.data(), cosines.data(), sines.data(), b, heads * group, d, d, type);
  const double tolerance = type == kFloat32 ? 1e-5 : 2e-2;
  for (int64_t i = 0; i < b * heads * group * d; ++i) {
    const int64_t j = i % d, angle = i / (heads * group * d) * d + j;
    const double other = j < d / 2 ? -q[i + d / 2] : q[i - d / 2];
    expect(turned[i], q[i] * cosines[angle] + other * sines[angle], tolerance, "rotate");
  }
  Array keys(type, b * heads * count * d), values(type, b * heads * count * d);
  Array y(type, b * heads * group * d);
  calr_attend(q.data(), keys.data(), values.data(), y.data(), b, heads, group, count, d, 0.5f, type, 3);
  for (int64_t head = 0; head < b * heads * group; ++head) {
    const int64_t first = head / group * count;
    std::vector<double> query(d), wanted(d), weights(count);
    double total = 0;
    for (int64_t j = 0; j < d; ++j) query[j] = q[head * d + j];
    for (int64_t i = 0; i < count; ++i) total += weights[i] = std::exp(dot(keys, first + i, query) / 2);
    for (int64_t j = 0; j < d; ++j) {
      for (int64_t i = 0; i < count; ++i) wanted[j] += weights[i] / total * values[(first + i) * d + j];
      expect(y[head * d + j], wanted[j], tolerance, "attend");
    }
  }
}

void gated(int32_t type, int64_t m, int64_t k, int64_t hidden, int32_t activation) {
  Array x(type, m * k), gate(type, hidden * k), up(type, hidden * k), down(type, k * hidden);
  Array y(type, m * k);
  calr_layer layers[3] = {};
  layers[0].up = gate.data();
  layers[1].up = up.data();
  layers[2].up = down.data();
  layers[0].n = layers[1].n = hidden;
  layers[2].n = k;
  for (auto& layer : layers) layer.type = type;
  calr_gated(x.data(), layers, y.data(), m, k, activation, type, 2);
  for (int64_t row = 0; row < m; ++row) {
    std::vector<double> in(k), h(hidden);
    for (int64_t i = 0; i < k; ++i) in[i] = x[row * k + i];
    for (int64_t i = 0; i < hidden; ++i) {
      const double g = dot(gate, i, in);
      const double z = activation ? 1.5957691216 * (g + 0.044715 * g * g * g) : g;
      h[i] = g / (1 + std::exp(-z)) * dot(up, i, in);
    }
    for (int64_t i = 0; i < k; ++i) {
      const double tolerance = type == kFloat32 ? 1e-5 : 4e-2;
      expect(y[row * k + i], dot(down, i, h), tolerance * hidden, "gated");
    }
  }
}

// A code of a record, as docs/formats.md describes it.
int code_of(const uint8_t* planes, int64_t i, int64_t group, int bits) {
  const int widths[][2] = {{2, 1}, {4, 0}, {4, 1}, {4, 2}, {0, 0}, {8, 0}};
  int code = 0, shift = 0;
  for (int width : widths[bits - 3]) {
    if (!width) break;
    const int64_t size = group * width / 8;
    code |= ((planes[i % size] >> (i / size * width)) & ((1 << width) - 1)) << shift;
    planes += size;
    shift += width;
  }
  return code;
}

// Records [rows, groups] of any codes, with scales of 2^-9 or -2^-9.
std::vector<uint8_t> random_records(int64_t rows, int64_t k, int64_t group, int32_t bits) {
  const int64_t count = rows * ((k + group - 1) / group), record = 2 + group * bits / 8;
  std::vector<uint8_t> records(count * record);
  for (auto& byte : records) byte = static_cast<uint8_t>(generator());
  for (int64_t i = 0; i < count; ++i) {
    records[i * record] = 0;
    records[i * record + 1] = generator() % 2 ? 0x18 : 0x98;
  }
  return records;
}

std::vector<int8_t> random_table() {
  std::vector<int8_t> table(64);
  for (auto& level : table) level = static_cast<int8_t>(generator());
  return table;
}

// A quantised layer and all that it points to.
struct Panels {
  std::vector<int8_t> table = random_table();
  std::vector<uint8_t> panels, down, terms;
  Array plain_down, plain_up;
  calr_layer layer{};

  Panels(int64_t n, int64_t k, int64_t group, int32_t bits, int64_t c, int32_t type, bool plain)
      : plain_down(type, plain ? c * k : 0), plain_up(type, plain ? c * n : 0) {
    panels = packed(random_records(n, k, group, bits), n, k, group, bits);
    down = packed(random_records(c, k, 32, 8), c, k, 32, 8);
    terms = random_records((n + 31) / 32, c * 32, 32, 8);
    layer.panels = panels.data(), layer.table = table.data();
    layer.corrective_down = down.data(), layer.corrective_up = terms.data();
    layer.n = n, layer.c = c, layer.group = group, layer.bits = bits;
    layer.type = type, layer.packed_corrective = !plain;
    if (!plain) return;
    layer.corrective_down = plain_down.data(), layer.corrective_up = plain_up.data();
  }

  static std::vector<uint8_t> packed(const std::vector<uint8_t>& records, int64_t n, int64_t k,
                                     int64_t group, int32_t bits) {
    const int64_t record = 16 * (2 + group * bits / 8);
    std::vector<uint8_t> found((n + 15) / 16 * ((k + group - 1) / group) * record);
    calr_pack(records.data(), found.data(), n, k, group, bits, 2);
    return found;
  }
};

// One block of all kinds of layers, for two sequences: the first token of one, a later one of another.
void block(int32_t type, int64_t hidden, int64_t count, int64_t d, bool low_rank) {
  const int64_t heads = 4, key_heads = 2, b = 2, inner = 37, capacity = count + 1, rank = 5;
  const int64_t width[7][2] = {{heads * d, hidden}, {key_heads * d, hidden}, {key_heads * d, hidden},
                               {hidden, heads * d}, {inner, hidden},         {inner, hidden},
                               {hidden, inner}};
  std::vector<Panels> quantised;
  std::vector<Array> numbers;
  std::vector<std::vector<int32_t>> places;
  quantised.reserve(7), numbers.reserve(16), places.reserve(16);
  calr_layer layers[7] = {};
  for (int i = 0; i < 7; ++i) {
    const int64_t n = width[i][0], k = width[i][1];
    if (low_rank) {
      layers[i].n = n, layers[i].r = rank, layers[i].type = type;
      layers[i].down = (numbers.emplace_back(type, rank * k)).data();
      layers[i].up = (numbers.emplace_back(type, (n - rank) * rank)).data();
      places.emplace_back(), places.emplace_back();
      for (int32_t j = 0; j < n; ++j) places[2 * i + (j >= rank)].push_back(j);
      layers[i].pivots = places[2 * i].data(), layers[i].others = places[2 * i + 1].data();
    } else {
      layers[i] = quantised.emplace_back(n, k, 32, 3 + i % 4, i % 3 * 9, type, i % 2).layer;
    }
  }
  Array norms(type, 4 * hidden), head_norms(type, 2 * d), turns(type, 2 * b * d), x(type, b * hidden);
  Array keys(type, b * key_heads * capacity * d), values(keys);
  const int64_t size = type == kFloat32 ? 4 : 2;
  auto at = [&](Array& array, int64_t i) { return array.bytes.data() + i * size; };
  calr_block made{};
  for (int i = 0; i < 4; ++i) made.norms[i] = at(norms, i * hidden);
  made.q_norm = at(head_norms, 0), made.k_norm = at(head_norms, d);
  std::copy(layers, layers + 4, made.attention), std::copy(layers + 4, layers + 7, made.gated);
  made.heads = heads, made.key_heads = key_heads, made.d = d, made.epsilon = 1e-5f, made.scale = 0.3f;
  const calr_past past{keys.data(), values.data(), capacity, count, 0};
  const void *cosines[] = {at(turns, 0)}, *sines[] = {at(turns, b * d)};
  const int64_t starts[] = {0, count};
  const void* norm = low_rank ? nullptr : at(norms, 0);
  Array logits(type, b * inner), first(x);
  calr_decode(first.data(), &made, &past, 1, norm, layers + 4, logits.data(), cosines, sines, 0, starts, b,
              hidden, type, 3);
  for (int64_t i = 0; i < b * inner; ++i) expect(logits[i] - logits[i], 0, 0, "head");
  calr_decode(x.data(), &made, &past, 1, norm, nullptr, nullptr, cosines, sines, 0, starts, b, hidden, type, 3);
  for (int64_t i = 0; i < b * hidden; ++i) expect(x[i] - x[i], 0, 0, "block");
}

void quantized(int32_t type, int64_t m, int64_t k, int64_t n, int64_t group, int32_t bits) {
  const int64_t groups = (k + group - 1) / group, record = 2 + group * bits / 8;
  const std::vector<uint8_t> records = random_records(n, k, group, bits);
  const std::vector<int8_t> table = random_table();
  Array x(type, m * k), bias(type, n), y(type, m * n), numbers(type, n * k);
  calr_quantized_linear(x.data(), records.data(), table.data(), bias.data(), y.data(), m, k, n, group,
                        bits, type, 3);
  std::vector<float> scales(n * groups, 0.5f);
  calr_dequantize(records.data(), scales.data(), table.data(), numbers.data(), n, k, group, bits, type, 3);
  calr_scale_gradients(records.data(), table.data(), numbers.data(), scales.data(), n, k, group, bits, type, 3);
  calr_dequantize(records.data(), nullptr, table.data(), numbers.data(), n, k, group, bits, type, 3);
  const std::vector<uint8_t> panels = Panels::packed(records, n, k, group, bits);
  Array other(type, m * n);
  calr_layer layer{};
  layer.panels = panels.data(), layer.table = table.data(), layer.bias = bias.data();
  layer.n = n, layer.group = group, layer.bits = bits;
  void* ys[] = {other.data()};
  calr_linears(x.data(), &layer, 1, ys, m, k, type, 3);
  const double tolerance = type == kFloat32 ? 1e-5 : 4e-2;
  for (int64_t row = 0; row < n; ++row) {
    std::vector<double> wanted(m, bias[row]);
    for (int64_t i = 0; i < k; ++i) {
      const uint8_t* at = records.data() + (row * groups + i / group) * record;
      const int code = code_of(at + 2, i % group, group, bits);
      const double level = bits == 8 ? code - 128 : table[code];
      const double weight = level * (at[1] == 0x18 ? 1 : -1) / 512;
      expect(numbers[row * k + i], weight, tolerance, "number");
      for (int64_t j = 0; j < m; ++j) wanted[j] += weight * x[j * k + i];
    }
    for (int64_t j = 0; j < m; ++j) expect(y[j * n + row], wanted[j], tolerance, "quantized");
    for (int64_t j = 0; j < m; ++j) expect(other[j * n + row], wanted[j], tolerance, "panels");
  }
}

// A dense layer in panels against the same in rows.
void numbers(int32_t type, int64_t m, int64_t k, int64_t n) {
  Array x(type, m * k), weight(type, n * k), y(type, m * n), other(type, m * n);
  const int64_t together = type == kBFloat16 ? 2 : 1, columns = (k + together - 1) / together * together;
  Array panels(type, (n + 15) / 16 * 16 * columns);
  for (int64_t i = 0; i < (n + 15) / 16 * 16 * columns; ++i) {
    const int64_t within = i % (16 * columns), row = i / (16 * columns) * 16 + within / together % 16;
    const int64_t column = within / (16 * together) * together + within % together;
    const bool there = row < n && column < k;
    store(type, there ? weight[row * k + column] : 0.0f, panels.data(), i);
  }
  calr_layer layers[2] = {};
  layers[0].up = weight.data(), layers[1].up = panels.data(), layers[1].packed = 1;
  for (calr_layer& layer : layers) layer.n = n, layer.type = type;
  void* ys[] = {y.data(), other.data()};
  calr_linears(x.data(), layers, 2, ys, m, k, type, 3);
  for (int64_t i = 0; i < m * n; ++i) expect(other[i], y[i], type == kFloat32 ? 1e-5 : 4e-2, "numbers");
}

// Scales of a row and one block of columns, of which each code is the level nearest to its ratio.
void rounding(int32_t type, int64_t n, int64_t k, int64_t group) {
  Array weights(type, n * k), importance(kFloat32, k);
  std::vector<float> cells(512), scales(n * ((k + group - 1) / group)), rest(k * n), spreads(k * n);
  std::vector<uint8_t> cell_codes(512), codes(k * n);
  std::vector<float> errors(k * n), diagonal(k * (k + 3));
  for (int i = 0; i < 512; ++i) {  // levels -7 to 7
    const double middle = (i - 256 + 0.5) / 2;
    cells[i] = static_cast<float>(std::max(-7.0, std::min(7.0, std::round(middle))));
    cell_codes[i] = static_cast<uint8_t>(cells[i] + 7);
  }
  const float tried[] = {1.0f, -1.0f, 0.9f};
  const auto* weighed = static_cast<const float*>(importance.data());
  std::vector<float> positive(k);
  for (int64_t i = 0; i < k; ++i) positive[i] = std::fabs(weighed[i]);
  calr_search(weights.data(), positive.data(), cells.data(), 7.0f, tried, 3, scales.data(), n, k, group, 1,
              type, 3);
  for (float scale : scales) expect(std::isfinite(scale), 1, 0, "scale");
  const int64_t b = std::min<int64_t>(k, 64);
  for (int64_t i = 0; i < b; ++i) {
    diagonal[i * (k + 3) + i] = 2.0f;
    for (int64_t row = 0; row < n; ++row) {
      rest[i * n + row] = static_cast<float>(weights[row * k + i]);
      spreads[i * n + row] = 0.1f;
    }
  }
  calr_choose(rest.data(), spreads.data(), diagonal.data(), k + 3, cells.data(), cell_codes.data(), codes.data(),
              errors.data(), b, n, 3);
  for (int64_t i = 0; i < b * n; ++i) {
    const double level = std::max(-7.0, std::min(7.0, std::round(rest[i] / 0.1)));
    const double off = std::fabs(rest[i] / 0.1 - std::floor(rest[i] / 0.1) - 0.5);
    if (off > 1e-4) expect(codes[i], level + 7, 0, "code");
    if (off > 1e-4) expect(errors[i], (rest[i] - level * 0.1) / 2, 1e-5, "error");
  }
}

// Three threads, of which one is late at every step: the others are left out one by one, and those that
// stay do everything, once.
void team() {
  constexpr int64_t kSteps = 60, kCount = 100;
  calr::Barrier barrier;
  std::vector<std::atomic<int>> done(kSteps * kCount);
  std::atomic<int> left{0};
  const auto run = [&](int32_t rank) {
    barrier.start(3);
    const calr::Team own{&barrier, rank};
    try {
      for (int64_t step = 0; step < kSteps; ++step) {
        const auto [begin, end] = own.part(kCount, 16);
        for (int64_t i = begin; i < end; ++i) ++done[step * kCount + i];
        if (rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
        own.wait();
      }
    } catch (const calr::LeftOut&) {
      ++left;
    }
  };
  std::thread second(run, 1), third(run, 2);
  run(0);
  second.join(), third.join();
  expect(barrier.size(), 1, 0, "team");
  expect(left, 2, 0, "threads left out");
  for (const auto& count : done) expect(count, 1, 0, "what a team does");
}

}  // namespace

int main() {
  const int64_t shapes[][4] = {{1, 1, 1, 1},   {1, 576, 37, 9},  {2, 31, 19, 7},
                               {3, 33, 17, 5}, {5, 16, 64, 40}, {16, 7, 24, 8}};
  for (int32_t isa = 0; calr_select_isa(isa) == 0; ++isa) {
    for (const auto& s : shapes) {
      for (int32_t type = 0; type < 3; ++type) {
        for (int pivoted = 0; pivoted < 2; ++pivoted) {
          layer(type, type, s[0], s[1], s[2], s[3], 0, pivoted);
          layer(kFloat32, type, s[0], s[1], s[2], s[3], 0, pivoted);
        }
        layer(type, type, s[0], s[1], s[2], s[3], 3, false);
        gated(type, s[0], s[1], s[2], type % 2);
        norm(type, s[0], s[1]);
        numbers(type, s[0], s[1], s[2]);
        for (int32_t bits : {3, 4, 5, 6, 8}) {
          for (int64_t group : {32, 64, 96, 128}) quantized(type, s[0], s[1], s[2], group, bits);
        }
        for (int64_t group : {32, 64, 96, 128}) rounding(type, s[2], s[1], group);
        attention(type, s[0], 2, 3, s[3], 2 * s[2]);
        for (int low_rank = 0; low_rank < 2; ++low_rank) block(type, s[1] + 8, 70 * s[3], 8, low_rank);
      }
    }
  }
  team();
  const int32_t twice[] = {1, 1}, outside[] = {0, 4}, negative[] = {-1, 2};
  std::vector<int32_t> others(2);
  for (const int32_t* bad : {twice, outside, negative}) {
    expect(calr_complement(bad, others.data(), 4, 2), -1, 0, "bad pivots");
  }
  Array t(kFloat32, 6), rest(kFloat32, 9), y(kFloat32, 15);
  const int32_t pivots[] = {1, 3};
  expect(calr_interleave(t.data(), rest.data(), pivots, y.data(), 3, 5, 2, 4, 2), 0, 0, "status");
  expect(y[5 + 3], t[2 + 1], 0, "interleave");
  expect(y[10 + 4], rest[6 + 2], 0, "interleave");
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
