// hidden = act(gate) * up, each step rounded to X: SiLU x / (1 + exp(-x)), or GELU by tanh, which is x times a
// sigmoid too.
template <typename X>
void activate(int32_t activation, const float* gate, const float* up, float* hidden, int64_t count) {
  if (activation == 0) {
    for (int64_t i = 0; i < count; ++i) {
      const float x = gate[i];
      hidden[i] = rounded<X>(rounded<X>(x / (1.0f + exponential(-x))) * up[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const float x = gate[i], z = 1.5957691216f * (x + 0.044715f * x * x * x);
      hidden[i] = rounded<X>(rounded<X>(x / (1.0f + exponential(-z))) * up[i]);
    }
  }
}
