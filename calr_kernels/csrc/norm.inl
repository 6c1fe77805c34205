// The root mean square of a row is taken in float32; what the weight multiplies rounds to X first.
template <typename X>
void rms_norm(const X* x, const X* weight, X* y, int64_t k, float epsilon, int64_t begin,
              int64_t end) {
  const int64_t whole = k - k % CALR_LANES;
  for (int64_t row = begin; row < end; ++row) {
    const X* in = x + row * k;
    X* out = y + row * k;
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
    for (int64_t i = 0; i < k; ++i) {
      narrow(rounded<X>(widen(in[i]) * scale) * widen(weight[i]), out + i);
    }
  }
}
