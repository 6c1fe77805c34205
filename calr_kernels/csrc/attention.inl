// out [d] = the sum of weights[i] * values[i], i below count, values `stride` elements apart.
template <typename X>
inline void combine(const float* weights, const X* values, float* out, int64_t count, int64_t d,
                    int64_t stride) {
  constexpr int kAtOnce = 4;
  int64_t column = 0;
  for (; column + kAtOnce * CALR_LANES <= d; column += kAtOnce * CALR_LANES) {
    Vector total[kAtOnce] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < count; ++i) {
      const X* from = values + i * stride + column;
      const Vector weight = spread(weights[i]);
      for (int j = 0; j < kAtOnce; ++j) {
        total[j] = multiply_add(weight, load(from + j * CALR_LANES), total[j]);
      }
    }
    for (int j = 0; j < kAtOnce; ++j) store(total[j], out + column + j * CALR_LANES);
  }
  for (; column + CALR_LANES <= d; column += CALR_LANES) {
    Vector total = zero();
    for (int64_t i = 0; i < count; ++i) {
      total = multiply_add(spread(weights[i]), load(values + i * stride + column), total);
    }
    store(total, out + column);
  }
  if (column == d) return;
  Vector total = zero();
  for (int64_t i = 0; i < count; ++i) {
    const Vector value = load_part(values + i * stride + column, d - column);
    total = multiply_add(spread(weights[i]), value, total);
  }
  float rest[CALR_LANES];
  store(total, rest);
  std::memcpy(out + column, rest, (d - column) * sizeof(float));
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
    combine(own, values, out + i * d, count, d, d);
  }
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
