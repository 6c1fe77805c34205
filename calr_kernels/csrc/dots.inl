// Dot products of weight rows with inputs.
//
// A tile of ROWS weight rows and COLUMNS inputs keeps ROWS * COLUMNS accumulators in registers; a
// weight vector is loaded once and used for every input. The sum of a row does not depend on the
// tile it is computed in: one accumulator per row and input, lanes added in a fixed order.

// Call run(at, constant) for [at, at + constant) of count, MOST at once, a power of two, and the rest by halves.
template <int MOST, typename Run>
inline void in_tiles(int64_t count, const Run& run) {
  int64_t at = 0;
  for (; at + MOST <= count; at += MOST) run(at, std::integral_constant<int, MOST>{});
  if constexpr (MOST > 1) {
    if (at == count) return;
    in_tiles<MOST / 2>(count - at, [&](int64_t i, auto some) { run(at + i, some); });
  }
}

template <int ROWS, int COLUMNS, typename W>
inline void tile(const W* weight, const float* x, float* out, int64_t k, int64_t out_stride) {
  Vector total[COLUMNS][ROWS];
  for (int j = 0; j < COLUMNS; ++j) {
    for (int i = 0; i < ROWS; ++i) total[j][i] = zero();
  }
  const int64_t whole = k - k % CALR_LANES;
  // The next tile follows in memory and is fetched here, since the hardware's own prefetching stops
  // at pages and at short rows: row by row as it will be read, which took bfloat16 from 65 % to 90 %
  // of a Xeon's bandwidth, or, where rows are short, in the order of memory, from half to 90 % of an
  // EPYC's.
  constexpr int64_t kShortRow = 2560;  // bytes
  const W* ahead = weight + ROWS * k;
  const bool ordered = k * sizeof(W) <= kShortRow;
  const int64_t across = ordered ? CALR_LANES : k, along = ordered ? ROWS : 1;
  for (int64_t at = 0; at < whole; at += CALR_LANES) {
    Vector inputs[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) inputs[j] = load(x + j * k + at);
    for (int i = 0; i < ROWS; ++i) {
      prefetch(ahead + i * across + at * along);
      const Vector w = load(weight + i * k + at);
      for (int j = 0; j < COLUMNS; ++j) total[j][i] = multiply_add(w, inputs[j], total[j][i]);
    }
  }
  if (whole < k) {
    Vector inputs[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) inputs[j] = load_part(x + j * k + whole, k - whole);
    for (int i = 0; i < ROWS; ++i) {
      const Vector w = load_part(weight + i * k + whole, k - whole);
      for (int j = 0; j < COLUMNS; ++j) total[j][i] = multiply_add(w, inputs[j], total[j][i]);
    }
  }
  for (int j = 0; j < COLUMNS; ++j) sums<ROWS>(total[j], out + j * out_stride);
}

// A few weight rows with all inputs: after the first group of inputs the rows are in the cache.
template <int ROWS, typename W>
inline void rows(const W* weight, const float* x, float* out, int64_t m, int64_t k,
                 int64_t out_stride) {
  in_tiles<(ROWS < 8 ? 4 : 1)>(m, [&](int64_t at, auto inputs) {
    tile<ROWS, decltype(inputs)::value>(weight, x + at * k, out + at * out_stride, k, out_stride);
  });
}

template <typename W>
void dots(const W* weight, const float* x, float* out, int64_t m, int64_t k, int64_t out_stride,
          int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; m == 1 && row + 8 <= end; row += 8) {
    rows<8>(weight + row * k, x, out + row, m, k, out_stride);
  }
  for (; row + 4 <= end; row += 4) rows<4>(weight + row * k, x, out + row, m, k, out_stride);
  for (; row < end; ++row) rows<1>(weight + row * k, x, out + row, m, k, out_stride);
}
