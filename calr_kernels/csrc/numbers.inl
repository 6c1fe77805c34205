// Products of inputs with matrices of numbers in panels: 16 rows column by column, [ceil(N / 16)][K][16],
// so that no sum runs across lanes and every panel is read from its start to its end.

constexpr int kColumns = CALR_LANES == 16 ? 8 : 2;  // inputs that a panel is multiplied by at once
constexpr int kSums = 2;                            // of an output, so that none waits for the one before

// out[j * out_stride + row] = a panel's first `rows` rows times inputs x[j] [k], j below COLUMNS.
template <int COLUMNS, typename W>
inline void number_panel(const W* panel, const float* x, float* out, int64_t k, int64_t out_stride,
                         int64_t rows) {
  Vector total[COLUMNS][kSums][kVectors];
  for (int j = 0; j < COLUMNS; ++j) {
    for (int i = 0; i < kSums; ++i) {
      for (int part = 0; part < kVectors; ++part) total[j][i][part] = zero();
    }
  }
  const auto add = [&](int64_t at, int i) {
    for (int part = 0; part < kVectors; ++part) {
      const Vector w = load(panel + at * kPanel + part * CALR_LANES);
      for (int j = 0; j < COLUMNS; ++j) {
        total[j][i][part] = multiply_add(w, spread(x[j * k + at]), total[j][i][part]);
      }
    }
  };
  int64_t at = 0;
  for (; at + kSums <= k; at += kSums) {
    for (int i = 0; i < kSums; ++i) add(at + i, i);
  }
  for (; at < k; ++at) add(at, 0);
  for (int j = 0; j < COLUMNS; ++j) {
    float found[kPanel];
    for (int part = 0; part < kVectors; ++part) {
      Vector sum = total[j][0][part];
      for (int i = 1; i < kSums; ++i) sum = multiply_add(total[j][i][part], spread(1.0f), sum);
      store(sum, found + part * CALR_LANES);
    }
    std::memcpy(out + j * out_stride, found, (rows < kPanel ? rows : kPanel) * sizeof(float));
  }
}

// out [m, out_stride]: rows [begin, end) of the matrix, begin a multiple of 16, times x [m, k].
template <typename W>
void number_products(const W* panels, const float* x, float* out, int64_t m, int64_t k,
                     int64_t out_stride, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kPanel) {
    int64_t j = 0;
    for (; j + kColumns <= m; j += kColumns) {
      number_panel<kColumns>(panels + row * k, x + j * k, out + j * out_stride + row, k, out_stride,
                             end - row);
    }
    for (; j < m; ++j) {
      number_panel<1>(panels + row * k, x + j * k, out + j * out_stride + row, k, out_stride, end - row);
    }
  }
}
