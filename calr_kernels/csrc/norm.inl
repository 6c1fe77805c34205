// The root mean square of a row is taken in float32. What the weight
// multiplies rounds to X first or, with the weight counted from 1, as Gemma's norms do, only the product.
template <typename X, typename In, typename Out>
void rms_norm(const In* x, const X* weight, Out* y, int64_t k, float epsilon, bool from_one,
              int64_t begin, int64_t end) {
  const int64_t whole = k - k % CALR_LANES;
  for (int64_t row = begin; row < end; ++row) {
    const In* in = x + row * k;
    Out* out = y + row * k;
    Vector squares[1] = {zero()};
    for (int64_t at = 0; at < whole; at += CALR_LANES) {
      const Vector v = load(in + at);
      *squares = multiply_add(v, v, *squares);
    }
    if (whole < k) {
      const Vector v = load_part(in + whole, k - whole);
      *squares = multiply_add(v, v, *squares);
    }
    float total;
    sums<1>(squares, &total);
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(k) + epsilon);
    if (from_one) {
      for (int64_t i = 0; i < k; ++i) {
        narrow(rounded<X>(widen(in[i]) * scale * (1.0f + widen(weight[i]))), out + i);
      }
    } else {
      for (int64_t i = 0; i < k; ++i) {
        narrow(rounded<X>(rounded<X>(widen(in[i]) * scale) * widen(weight[i])), out + i);
      }
    }
  }
}

// In place: to X and back.
template <typename X>
void round_all(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = rounded<X>(values[i]);
}

// out = values, rounded to X.
template <typename X>
void narrow_all(const float* values, X* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(values[i], out + i);
}

// x += y, rounded to X.
template <typename X>
void add_rounded(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = rounded<X>(x[i] + y[i]);
}
