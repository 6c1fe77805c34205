// ROWS of what `combine` makes, of VECTORS vectors of columns; the last `part` columns where that is not 0.
template <int ROWS, int VECTORS, typename X>
inline void combine_tile(const float* weights, int64_t apart, const X* values, float* out, int64_t out_stride,
                         int64_t count, int64_t stride, int64_t part = 0) {
  Vector total[ROWS][VECTORS];
  for (auto& row : total) {
    for (Vector& sum : row) sum = zero();
  }
  for (int64_t i = 0; i < count; ++i, values += stride) {
    Vector value[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      value[j] = part ? load_part(values, part) : load(values + j * CALR_LANES);
    }
    for (int row = 0; row < ROWS; ++row) {
      const Vector weight = spread(weights[row * apart + i]);
      for (int j = 0; j < VECTORS; ++j) total[row][j] = multiply_add(weight, value[j], total[row][j]);
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    float* to = out + row * out_stride;
    float rest[CALR_LANES];
    for (int j = 0; j < VECTORS; ++j) store(total[row][j], part ? rest : to + j * CALR_LANES);
    if (part) std::memcpy(to, rest, part * sizeof(float));
  }
}

// out [rows, d], rows out_stride apart = the sums of weights[i] * values[i], i below count: weights [rows,
// count], rows `apart` elements apart, values [count, d], rows `stride` apart.
template <typename X>
inline void combine(const float* weights, int64_t apart, int64_t rows, const X* values, float* out,
                    int64_t out_stride, int64_t count, int64_t d, int64_t stride) {
  in_tiles<4>(rows, [&](int64_t row, auto some) {
    constexpr int kRows = decltype(some)::value;
    constexpr int kAtOnce = CALR_LANES == 16 || kRows == 1 ? 4 : 2;  // vectors: sums stay in registers
    const float* own = weights + row * apart;
    float* to = out + row * out_stride;
    int64_t at = 0;
    for (; at + kAtOnce * CALR_LANES <= d; at += kAtOnce * CALR_LANES) {
      combine_tile<kRows, kAtOnce>(own, apart, values + at, to + at, out_stride, count, stride);
    }
    for (; at + CALR_LANES <= d; at += CALR_LANES) {
      combine_tile<kRows, 1>(own, apart, values + at, to + at, out_stride, count, stride);
    }
    if (at < d) combine_tile<kRows, 1>(own, apart, values + at, to + at, out_stride, count, stride, d - at);
  });
}

inline float largest_of(const float* values, int64_t count) {
  Vector most = spread(values[0]);
  int64_t j = 0;
  for (; j + CALR_LANES <= count; j += CALR_LANES) most = larger(load(values + j), most);
  float lanes[CALR_LANES], found = values[0];
  store(most, lanes);
  for (float lane : lanes) found = lane > found ? lane : found;
  for (; j < count; ++j) found = values[j] > found ? values[j] : found;
  return found;
}

inline float sum_of(const float* values, int64_t count) {
  const Vector one = spread(1.0f);
  Vector sum = zero();
  int64_t j = 0;
  for (; j + CALR_LANES <= count; j += CALR_LANES) sum = multiply_add(load(values + j), one, sum);
  float lanes[CALR_LANES], total = 0;
  store(sum, lanes);
  for (float* lane = lanes; j < count; ++j) *lane++ += values[j];
  for (float lane : lanes) total += lane;
  return total;
}

// What queries [group, d], scaled, gather from keys and values [count, d]: most [group], the largest
// score, total [group], the sum of exp(score - most), and out [group, d], the values weighted by that.
// scores: [group, count].
template <typename X>
void gather(const float* q, const X* keys, const X* values, float* most, float* total, float* out,
            int64_t group, int64_t count, int64_t d, float* scores) {
  dots(keys, q, scores, group, d, count, 0, count);
  for (int64_t i = 0; i < group; ++i) {
    float* own = scores + i * count;
    const float largest = largest_of(own, count);
    for (int64_t j = 0; j < count; ++j) own[j] = exponential(own[j] - largest);
    most[i] = largest, total[i] = sum_of(own, count);
  }
  combine(scores, count, group, values, out, d, count, d, d);
}

// y [d] = what `parts` of the context have gathered for one query, brought together: their most, total
// and out lie `stride` elements apart.
inline void bring_together(const float* most, const float* total, const float* out, float* y,
                           int64_t parts, int64_t stride, int64_t d) {
  float largest = most[0], sum = 0;
  for (int64_t i = 1; i < parts; ++i) {
    largest = most[i * stride] > largest ? most[i * stride] : largest;
  }
  for (int64_t j = 0; j < d; ++j) y[j] = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const float weight = exponential(most[i * stride] - largest);
    sum += weight * total[i * stride];
    for (int64_t j = 0; j < d; ++j) y[j] += weight * out[i * stride + j];
  }
  for (int64_t j = 0; j < d; ++j) y[j] /= sum;
}

// A head x [d] turned by the angles of cosines and sines, in place; products round to X.
template <typename X>
inline void rotate(float* x, const X* cosines, const X* sines, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half];
    x[j] = rounded<X>(rounded<X>(a * widen(cosines[j])) - rounded<X>(b * widen(sines[j])));
    x[j + half] =
        rounded<X>(rounded<X>(b * widen(cosines[j + half])) + rounded<X>(a * widen(sines[j + half])));
  }
}
