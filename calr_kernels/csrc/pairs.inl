// Products of inputs with matrices of bfloat16 in panels by the instruction for pairs of them: twice as many
// a cycle. Products are exact, sums are in float32; numbers below 2^-126 count as 0.

constexpr int kPairColumns = 8;  // inputs that a panel is multiplied by at once
constexpr int kPairSums = 2;     // of an output, so that none waits for the one before

// Inputs x [m, k], bfloat16 numbers as float32, two neighbours in 32 bits: from j * ceil(k / 2) on those of
// the inputs that are multiplied at once, [ceil(k / 2)][inputs], since rows of a power of two would share
// their places in the cache.
inline void pair_up(const float* x, uint32_t* pairs, int64_t m, int64_t k) {
  in_tiles<kPairColumns>(m, [&](int64_t first, auto columns) {
    constexpr int kAtOnce = decltype(columns)::value;
    for (int64_t j = 0; j < kAtOnce; ++j) {
      const float* from = x + (first + j) * k;
      uint32_t* to = pairs + first * ((k + 1) / 2) + j;
      for (int64_t i = 0; i < k; i += 2, to += kAtOnce) {
        uint32_t two[2] = {};
        std::memcpy(two, from + i, i + 1 < k ? 8 : 4);
        *to = two[0] >> 16 | (two[1] & 0xffff0000u);
      }
    }
  });
}

// out[j * out_stride + row] = a panel's first `rows` rows times inputs x [pairs][COLUMNS]. lines: of the cache,
// to fetch with as many as are summed apart, from `next` on.
template <int COLUMNS, typename W>
inline void pair_panel(const W* panel, const uint32_t* x, float* out, int64_t pairs, int64_t out_stride,
                       int64_t rows, const W* next, int64_t lines) {
  __m512 total[COLUMNS][kPairSums];
  for (int j = 0; j < COLUMNS; ++j) {
    for (int i = 0; i < kPairSums; ++i) total[j][i] = _mm512_setzero_ps();
  }
  const auto add = [&](int64_t at, int i) {
    const __m512i w = _mm512_loadu_si512(panel + at * 2 * kPanel);
    for (int j = 0; j < COLUMNS; ++j) {
      const __m512i both = _mm512_set1_epi32(static_cast<int32_t>(x[at * COLUMNS + j]));
      total[j][i] = _mm512_dpbf16_ps(total[j][i], (__m512bh)w, (__m512bh)both);
    }
  };
  int64_t at = 0;
  for (; at + kPairSums <= pairs; at += kPairSums) {
    for (int64_t line = 0; line < lines; ++line, next += 2 * kPanel) {
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);  // two panels would fill the first cache
    }
    for (int i = 0; i < kPairSums; ++i) add(at + i, i);
  }
  for (; at < pairs; ++at) add(at, 0);
  const auto kept = static_cast<__mmask16>(rows < kPanel ? (1u << rows) - 1 : 0xffffu);
  for (int j = 0; j < COLUMNS; ++j) {
    _mm512_mask_storeu_ps(out + j * out_stride, kept, _mm512_add_ps(total[j][0], total[j][1]));
  }
}

// out [m, out_stride]: rows [begin, end) of the matrix, begin a multiple of 16, times what `pair_up` made.
template <typename W>
void pair_products(const W* panels, const uint32_t* x, float* out, int64_t m, int64_t pairs,
                   int64_t out_stride, int64_t begin, int64_t end) {
  // The next panel is fetched meanwhile, as in `panels_products`; two columns of a panel are one line.
  const int64_t turns = (m + kPairColumns - 1) / kPairColumns;
  const int64_t lines = turns > 1 ? (kPairSums + turns - 1) / turns : 0;
  for (int64_t row = begin; row < end; row += kPanel) {
    const W* panel = panels + row * 2 * pairs;
    in_tiles<kPairColumns>(m, [&](int64_t j, auto columns) {
      const W* next = panel + 2 * kPanel * (pairs + j / kPairColumns * (pairs / kPairSums * lines));
      pair_panel<decltype(columns)::value>(panel, x + j * pairs, out + j * out_stride + row, pairs, out_stride,
                                           end - row, next, lines);
    });
  }
}
