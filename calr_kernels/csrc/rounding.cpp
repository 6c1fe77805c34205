// Rounding of weights: the search for scales, and the choice of integers column by column.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "calr.h"
#include "isa.h"
#include "team.h"

void calr_search(const void* weights, const float* importance, const float* cells, float most,
                 const float* tried, int64_t choices, float* scales, int64_t n, int64_t k, int64_t group,
                 int32_t coarse, int32_t type, int32_t threads) {
  const int64_t groups = (k + group - 1) / group;
  typed(type, [&](auto value) {
    using W = decltype(value);
    calr::parallel(threads, n, k * choices, [&](int64_t begin, int64_t end) {
      std::vector<float> wide(k);
      for (int64_t row = begin; row < end; ++row) {
        const W* own = static_cast<const W*>(weights) + row * k;
        for (int64_t i = 0; i < k; ++i) wide[i] = widen(own[i]);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t start = g * group, count = std::min(group, k - start);
          scales[row * groups + g] = CALR_BY_ISA(searched, wide.data() + start, importance + start, count,
                                                 cells, most, tried, choices, coarse != 0);
        }
      }
    });
  });
}

void calr_choose(const float* rest, const float* spreads, const float* factor, int64_t stride,
                 const float* cells, const uint8_t* cell_codes, uint8_t* codes, float* errors, int64_t b,
                 int64_t n, int32_t threads) {
  calr::parallel(threads, (n + 15) / 16, 16 * b * b, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * 16; row < std::min(end * 16, n);) {
      const int64_t lanes = CALR_BY_ISA(lanes), count = std::min(lanes, std::min(end * 16, n) - row);
      CALR_BY_ISA(chosen_columns, rest + row, spreads + row, factor, stride, cells, cell_codes, codes + row,
                  errors + row, b, n, count);
      row += count;
    }
  });
}
