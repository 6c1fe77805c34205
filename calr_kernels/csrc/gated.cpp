// A gated feed-forward block.

#include <cstdint>
#include <vector>

#include "isa.h"
#include "linear.h"

void calr::gate(const Team& team, const calr_layer* layers, const float* x, int64_t m, int64_t k,
                int32_t activation, int32_t x_type, float* hidden, float* scratch) {
  const int64_t n = layers[0].n, stride = room(n);
  float* outs[2] = {scratch, scratch + m * stride};
  multiply(team, layers, 2, x, m, k, x_type, outs, scratch + 2 * m * stride);
  const auto [begin, end] = team.part(n, 16);
  fetch(team, layers[2], n);
  typed(x_type, [&](auto x) {
    for (int64_t row = 0; row < m; ++row) {
      const float *own = outs[0] + row * stride + begin, *up = outs[1] + row * stride + begin;
      CALR_BY_ISA(activate<decltype(x)>, activation, own, up, hidden + row * n + begin, end - begin);
    }
  });
}

void calr_gated(const void* x, const calr_layer* layers, void* y, int64_t m, int64_t k,
                int32_t activation, int32_t x_type, int32_t threads) {
  thread_local std::vector<float> buffer;
  const int64_t n = layers[0].n, hidden_size = layers[2].n;
  int64_t scratch = 2 * calr::room(n), operations = 0;
  for (int i = 0; i < 3; ++i) {
    scratch += calr::scratch_of(layers[i]);
    operations += m * calr::weights_of(layers[i], i < 2 ? k : n);
  }
  buffer.resize(m * (k + n + calr::room(hidden_size) + scratch));
  float *wide = buffer.data(), *hidden = wide + m * k, *out = hidden + m * n;
  float* rest = out + m * calr::room(hidden_size);
  typed(x_type, [&](auto value) {
    using X = decltype(value);
    for (int64_t i = 0; i < m * k; ++i) wide[i] = widen(static_cast<const X*>(x)[i]);
    calr::together(calr::useful(threads, operations), [&](const calr::Team& team) {
      calr::gate(team, layers, wide, m, k, activation, x_type, hidden, rest);
      team.wait();
      calr::multiply(team, layers + 2, 1, hidden, m, n, x_type, &out, rest);
      const auto [begin, end] = team.part(hidden_size, 16);
      for (int64_t row = 0; row < m; ++row) {
        const float* from = out + row * calr::room(hidden_size);
        CALR_BY_ISA(narrow_all, from + begin, static_cast<X*>(y) + row * hidden_size + begin, end - begin);
      }
    });
  });
}
