// exp for |x| < 87 to two units in the last place, clamped beyond: 2^n times a polynomial on
// [-ln2/2, ln2/2]. NaN for NaN.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = x * 1.44269504f + shift;
  const float n = shifted - shift;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  // n is the low bits of `shifted`: a conversion of n itself would be undefined where x is NaN
  uint32_t exponent;
  std::memcpy(&exponent, &shifted, 4);
  exponent = (exponent + 127u) << 23;
  float power;
  std::memcpy(&power, &exponent, 4);
  return p * power;
}
