// Quantised linear layers for small batches, and quantised matrices as numbers.

#include <cstdint>
#include <vector>

#include "bits.h"
#include "calr.h"
#include "isa.h"
#include "team.h"

void calr_quantized_linear(const void* x, const uint8_t* records, const int8_t* table, const void* bias,
                           void* y, int64_t m, int64_t k, int64_t n, int64_t group, int32_t bits,
                           int32_t x_type, int32_t threads) {
  const int64_t groups = (k + group - 1) / group, padded = groups * group;
  std::vector<float> wide(m * padded), out(m * n);  // zeros where a row is padded
  typed(x_type, [&](auto value) {
    using X = decltype(value);
    for (int64_t row = 0; row < m; ++row) {
      const X* in = static_cast<const X*>(x) + row * k;
      for (int64_t i = 0; i < k; ++i) wide[row * padded + i] = widen(in[i]);
    }
    calr::parallel(threads, n, m * k, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> codes(group);
      of_bits(bits, [&](auto constant) {
        CALR_BY_ISA(quantized_dots<decltype(constant)::value>, records, table, wide.data(), out.data(), m, n,
                    groups, group, begin, end, codes.data());
      });
      for (int64_t row = 0; row < m; ++row) {
        for (int64_t i = begin; i < end; ++i) {
          const float added = bias ? widen(static_cast<const X*>(bias)[i]) : 0.0f;
          narrow(out[row * n + i] + added, static_cast<X*>(y) + row * n + i);
        }
      }
    });
  });
}

// Run(bits, row, codes) for every row of records [n, groups]: bits a constant, codes room for a group's.
template <typename Run>
static void by_rows(int64_t n, int64_t k, int64_t group, int32_t bits, int32_t threads, const Run& run) {
  calr::parallel(threads, n, k, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(group);
    of_bits(bits, [&](auto constant) {
      for (int64_t row = begin; row < end; ++row) run(constant, row, codes.data());
    });
  });
}

void calr_dequantize(const uint8_t* records, const float* scales, const int8_t* table, void* y, int64_t n,
                     int64_t k, int64_t group, int32_t bits, int32_t type, int32_t threads) {
  const int64_t groups = (k + group - 1) / group, bytes = groups * (2 + group * bits / 8);
  typed(type, [&](auto value) {
    using Y = decltype(value);
    by_rows(n, k, group, bits, threads, [&](auto constant, int64_t row, uint8_t* codes) {
      CALR_BY_ISA(dequantized_row<decltype(constant)::value>, records + row * bytes,
                  scales ? scales + row * groups : nullptr, table, static_cast<Y*>(y) + row * k, k, group, codes);
    });
  });
}

void calr_scale_gradients(const uint8_t* records, const int8_t* table, const void* gradients, float* sums,
                          int64_t n, int64_t k, int64_t group, int32_t bits, int32_t type, int32_t threads) {
  const int64_t groups = (k + group - 1) / group, bytes = groups * (2 + group * bits / 8);
  typed(type, [&](auto value) {
    using G = decltype(value);
    by_rows(n, k, group, bits, threads, [&](auto constant, int64_t row, uint8_t* codes) {
      CALR_BY_ISA(level_sums<decltype(constant)::value>, records + row * bytes, table,
                  static_cast<const G*>(gradients) + row * k, sums + row * groups, k, group, codes);
    });
  });
}

void calr_pack(const uint8_t* records, uint8_t* panels, int64_t n, int64_t k, int64_t group, int32_t bits,
               int32_t threads) {
  const int64_t groups = (k + group - 1) / group;
  calr::parallel(threads, (n + 15) / 16, 16 * k, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(16 * group);
    of_bits(bits, [&](auto constant) {
      CALR_BY_ISA(pack_panels<decltype(constant)::value>, records, panels, n, groups, group, begin, end,
                  codes.data());
    });
  });
}
