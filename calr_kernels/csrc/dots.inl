// Dot products of weight rows with inputs, and what goes with them, for one instruction set
// (CALR_NAMESPACE, CALR_LANES).
//
// A tile of ROWS weight rows and COLUMNS inputs keeps ROWS * COLUMNS accumulators in registers; a
// weight vector is loaded once and used for every input. The sum of a row does not depend on the
// tile it is computed in: one accumulator per row and input, lanes added in a fixed order.

namespace CALR_NAMESPACE {

#if CALR_LANES == 16
using Vector = __m512;
inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector spread(float value) { return _mm512_set1_ps(value); }
inline void store(Vector v, float* p) { _mm512_storeu_ps(p, v); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Vector load(const bfloat16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline Vector load(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vector load_part(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
inline Vector load_part(const bfloat16* p, int64_t count) {
  const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline Vector load_part(const float16* p, int64_t count) {
  const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return _mm512_cvtph_ps(raw);
}
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline __m256 fold(Vector v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
#elif CALR_LANES == 8
using Vector = __m256;
inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector spread(float value) { return _mm256_set1_ps(value); }
inline void store(Vector v, float* p) { _mm256_storeu_ps(p, v); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector load(const bfloat16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline Vector load(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256 fold(Vector v) { return v; }
#else
struct Vector {
  float lane[CALR_LANES];
};
inline Vector zero() { return Vector{}; }
inline Vector spread(float value) {
  Vector v;
  for (float& lane : v.lane) lane = value;
  return v;
}
inline void store(const Vector& v, float* p) { std::memcpy(p, v.lane, sizeof(v.lane)); }
template <typename W>
inline Vector load(const W* p) {
  Vector v;
  for (int i = 0; i < CALR_LANES; ++i) v.lane[i] = widen(p[i]);
  return v;
}
inline Vector multiply_add(const Vector& a, const Vector& b, Vector c) {
  for (int i = 0; i < CALR_LANES; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
template <int COUNT>
inline void sums(const Vector* v, float* out) {
  for (int i = 0; i < COUNT; ++i) {
    out[i] = (v[i].lane[0] + v[i].lane[1]) + (v[i].lane[2] + v[i].lane[3]);
  }
}
#endif
#if CALR_LANES > 4
// out[i] = the lanes of v[i] added in one fixed order, whatever COUNT: 1 or a multiple of 4.
template <int COUNT>
inline void sums(const Vector* v, float* out) {
  for (int i = 0; i < COUNT; i += 4) {
    const __m256 a = fold(v[i]), b = COUNT > 1 ? fold(v[i + 1]) : a;
    const __m256 c = COUNT > 1 ? fold(v[i + 2]) : a, d = COUNT > 1 ? fold(v[i + 3]) : a;
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 all =
        _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    if (COUNT > 1) {
      _mm_storeu_ps(out + i, all);
    } else {
      *out = _mm_cvtss_f32(all);
    }
  }
}
#endif
#if CALR_LANES < 16
template <typename W>
inline Vector load_part(const W* p, int64_t count) {
  W padded[CALR_LANES] = {};
  std::memcpy(padded, p, count * sizeof(W));
  return load(padded);
}
#endif

template <int ROWS, int COLUMNS, typename W>
inline void tile(const W* weight, const float* x, float* out, int64_t k, int64_t out_stride) {
  Vector total[COLUMNS][ROWS];
  for (int j = 0; j < COLUMNS; ++j) {
    for (int i = 0; i < ROWS; ++i) total[j][i] = zero();
  }
  const int64_t whole = k - k % CALR_LANES;
#if CALR_LANES > 4
  // The next tile follows in memory and is fetched here, since the hardware's own prefetching stops
  // at pages and at short rows: row by row as it will be read, which took bfloat16 from 65 % to 90 %
  // of a Xeon's bandwidth, or, where rows are short, in the order of memory, from half to 90 % of an
  // EPYC's.
  const W* ahead = weight + ROWS * k;
  const bool ordered = k * sizeof(W) <= SHORT_ROW;
  const int64_t across = ordered ? CALR_LANES : k, along = ordered ? ROWS : 1;
#endif
  for (int64_t at = 0; at < whole; at += CALR_LANES) {
    Vector inputs[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) inputs[j] = load(x + j * k + at);
    for (int i = 0; i < ROWS; ++i) {
#if CALR_LANES > 4
      _mm_prefetch(reinterpret_cast<const char*>(ahead + i * across + at * along), _MM_HINT_T0);
#endif
      const Vector w = load(weight + i * k + at);
      for (int j = 0; j < COLUMNS; ++j) total[j][i] = multiply_add(w, inputs[j], total[j][i]);
    }
  }
  if (whole < k) {
    Vector inputs[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) inputs[j] = load_part(x + j * k + whole, k - whole);
    for (int i = 0; i < ROWS; ++i) {
      const Vector w = load_part(weight + i * k + whole, k - whole);
      for (int j = 0; j < COLUMNS; ++j) total[j][i] = multiply_add(w, inputs[j], total[j][i]);
    }
  }
  for (int j = 0; j < COLUMNS; ++j) sums<ROWS>(total[j], out + j * out_stride);
}

// A few weight rows with all inputs: after the first group of inputs the rows are in the cache.
template <int ROWS, typename W>
inline void rows(const W* weight, const float* x, float* out, int64_t m, int64_t k,
                 int64_t out_stride) {
  int64_t at = 0;
  for (; at + 4 <= m && ROWS < 8; at += 4) {
    tile<ROWS, 4>(weight, x + at * k, out + at * out_stride, k, out_stride);
  }
  for (; at + 2 <= m && ROWS < 8; at += 2) {
    tile<ROWS, 2>(weight, x + at * k, out + at * out_stride, k, out_stride);
  }
  for (; at < m; ++at) tile<ROWS, 1>(weight, x + at * k, out + at * out_stride, k, out_stride);
}

template <typename W>
void dots(const W* weight, const float* x, float* out, int64_t m, int64_t k, int64_t out_stride,
          int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; m == 1 && row + 8 <= end; row += 8) {
    rows<8>(weight + row * k, x, out + row, m, k, out_stride);
  }
  for (; row + 4 <= end; row += 4) rows<4>(weight + row * k, x, out + row, m, k, out_stride);
  for (; row < end; ++row) rows<1>(weight + row * k, x, out + row, m, k, out_stride);
}

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

// exp for |x| < 87 to two units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2].
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float n = (x * 1.44269504f + shift) - shift;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const uint32_t exponent = (static_cast<uint32_t>(static_cast<int32_t>(n)) + 127u) << 23;
  float power;
  std::memcpy(&power, &exponent, 4);
  return p * power;
}

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
  constexpr int AT_ONCE = 4;
  int64_t column = 0;
  for (; column + AT_ONCE * CALR_LANES <= d; column += AT_ONCE * CALR_LANES) {
    Vector total[AT_ONCE] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < count; ++i) {
      const X* from = values + i * d + column;
      const Vector weight = spread(weights[i]);
      for (int j = 0; j < AT_ONCE; ++j) {
        total[j] = multiply_add(weight, load(from + j * CALR_LANES), total[j]);
      }
    }
    for (int j = 0; j < AT_ONCE; ++j) store(total[j], out + column + j * CALR_LANES);
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
  CALR_NAMESPACE::dots(keys, scratch, scores, group, d, count, 0, count);
  for (int64_t i = 0; i < group; ++i) {
    softmax(scores + i * count, count);
    combine(scores + i * count, values, out, count, d);
    for (int64_t j = 0; j < d; ++j) narrow(out[j], y + i * d + j);
  }
}

}  // namespace CALR_NAMESPACE
