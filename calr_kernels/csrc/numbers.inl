// Products of inputs with matrices of numbers in panels: 16 rows column by column, [ceil(N / 16)][K][16],
// so that no sum runs across lanes and every panel is read from its start to its end. Of bfloat16 two
// columns lie together, [ceil(N / 16)][ceil(K / 2)][16][2], as the instruction for pairs takes them (pairs.inl).

constexpr int kColumns = CALR_LANES == 16 ? 8 : 2;  // inputs that a panel is multiplied by at once
constexpr int kSums = 2;                            // of an output, so that none waits for the one before

// Elements of a panel of k columns.
template <typename W>
constexpr int64_t panel_size(int64_t k) {
  return kPanel * (std::is_same<W, bfloat16>::value ? k + k % 2 : k);
}

// Two columns of a part of a panel, of which a pair is the beginning.
template <typename W>
inline void two_columns(const W* pair, int part, Vector& first, Vector& second) {
  first = load(pair + part * CALR_LANES);
  second = load(pair + kPanel + part * CALR_LANES);
}
inline void two_columns(const bfloat16* pair, int part, Vector& first, Vector& second) {
  load_pairs(pair + 2 * part * CALR_LANES, first, second);
}
template <typename W>
inline Vector last_column(const W* column, int part) {
  return load(column + part * CALR_LANES);
}
inline Vector last_column(const bfloat16* pair, int part) {
  Vector first, second;
  load_pairs(pair + 2 * part * CALR_LANES, first, second);
  return first;
}

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
  int64_t at = 0;
  for (; at + kSums <= k; at += kSums) {
    for (int part = 0; part < kVectors; ++part) {
      Vector w[kSums];
      two_columns(panel + at * kPanel, part, w[0], w[1]);
      for (int j = 0; j < COLUMNS; ++j) {
        for (int i = 0; i < kSums; ++i) {
          total[j][i][part] = multiply_add(w[i], spread(x[j * k + at + i]), total[j][i][part]);
        }
      }
    }
  }
  if (at < k) {
    for (int part = 0; part < kVectors; ++part) {
      const Vector w = last_column(panel + at * kPanel, part);
      for (int j = 0; j < COLUMNS; ++j) {
        total[j][0][part] = multiply_add(w, spread(x[j * k + at]), total[j][0][part]);
      }
    }
  }
  for (int j = 0; j < COLUMNS; ++j) {
    float some[kPanel], *found = rows < kPanel ? some : out + j * out_stride;
    for (int part = 0; part < kVectors; ++part) {
      const Vector sum = multiply_add(total[j][1][part], spread(1.0f), total[j][0][part]);
      store(sum, found + part * CALR_LANES);
    }
    if (rows < kPanel) std::memcpy(out + j * out_stride, some, rows * sizeof(float));
  }
}

// out [m, out_stride]: rows [begin, end) of the matrix, begin a multiple of 16, times x [m, k].
template <typename W>
void number_products(const W* panels, const float* x, float* out, int64_t m, int64_t k,
                     int64_t out_stride, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kPanel) {
    const W* panel = panels + row / kPanel * panel_size<W>(k);
    in_tiles<kColumns>(m, [&](int64_t j, auto columns) {
      number_panel<decltype(columns)::value>(panel, x + j * k, out + j * out_stride + row, k, out_stride,
                                             end - row);
    });
  }
}
