// In place: SiLU x / (1 + exp(-x)), or GELU by tanh, which is x times a sigmoid too.
inline void activate(int32_t activation, float* values, int64_t count) {
  if (activation == 0) {
    for (int64_t i = 0; i < count; ++i) values[i] /= 1.0f + exponential(-values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const float x = values[i], z = 1.5957691216f * (x + 0.044715f * x * x * x);
      values[i] = x / (1.0f + exponential(-z));
    }
  }
}
