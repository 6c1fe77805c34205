// In place: exp(x - max) over its sum.
inline void softmax(float* x, int64_t count) {
  float largest = x[0], total = 0;
  for (int64_t i = 1; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  for (int64_t i = 0; i < count; ++i) x[i] = exponential(x[i] - largest);
  for (int64_t i = 0; i < count; ++i) total += x[i];
  for (int64_t i = 0; i < count; ++i) x[i] /= total;
}

// out [d] = the sum of weights[i] * values[i], values [count, d].
template <typename X>
inline void combine(const float* weights, const X* values, float* out, int64_t count, int64_t d) {
  constexpr int kAtOnce = 4;
  int64_t column = 0;
  for (; column + kAtOnce * CALR_LANES <= d; column += kAtOnce * CALR_LANES) {
    Vector total[kAtOnce] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < count; ++i) {
      const X* from = values + i * d + column;
      const Vector weight = spread(weights[i]);
      for (int j = 0; j < kAtOnce; ++j) {
        total[j] = multiply_add(weight, load(from + j * CALR_LANES), total[j]);
      }
    }
    for (int j = 0; j < kAtOnce; ++j) store(total[j], out + column + j * CALR_LANES);
  }
  for (; column < d; ++column) {
    out[column] = 0;
    for (int64_t i = 0; i < count; ++i) out[column] += weights[i] * widen(values[i * d + column]);
  }
}

// y [group, d] = softmax(scale * q keys') values: queries [group, d] that share keys and values
// [count, d]. scratch: group * (d + count) + d.
template <typename X>
void attend(const X* q, const X* keys, const X* values, X* y, int64_t group, int64_t count,
            int64_t d, float scale, float* scratch) {
  float *scores = scratch + group * d, *out = scores + group * count;
  for (int64_t i = 0; i < group * d; ++i) scratch[i] = scale * widen(q[i]);
  dots(keys, scratch, scores, group, d, count, 0, count);
  for (int64_t i = 0; i < group; ++i) {
    softmax(scores + i * count, count);
    combine(scores + i * count, values, out, count, d);
    for (int64_t j = 0; j < d; ++j) narrow(out[j], y + i * d + j);
  }
}
