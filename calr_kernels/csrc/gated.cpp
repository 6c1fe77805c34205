// A gated feed-forward block.

#include <cstdint>
#include <vector>

#include "calr.h"
#include "isa.h"

void calr_gated(const void* x, const calr_layer* layers, void* y, int64_t m, int64_t k,
                int32_t activation, int32_t x_type, int32_t weight_type, int32_t threads) {
  typed(x_type, [&](auto value) {
    using X = decltype(value);
    thread_local std::vector<X> outputs;
    thread_local std::vector<float> buffer;
    const int64_t hidden = layers[0].n, count = m * hidden;
    outputs.resize(2 * count);
    buffer.resize(count);
    X *gate = outputs.data(), *up = gate + count;
    float* wide = buffer.data();
    void* ys[2] = {gate, up};
    calr_linears(x, layers, 2, ys, m, k, x_type, weight_type, threads);
    for (int64_t i = 0; i < count; ++i) wide[i] = widen(gate[i]);
    CALR_BY_ISA(activate, activation, wide, count);
    for (int64_t i = 0; i < count; ++i) narrow(rounded<X>(wide[i]) * widen(up[i]), gate + i);
    calr_linears(gate, layers + 2, 1, &y, m, hidden, x_type, weight_type, threads);
  });
}
