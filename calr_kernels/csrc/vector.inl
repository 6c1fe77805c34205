// A vector of CALR_LANES float32: what else is compiled for each instruction set is written with these.

#if CALR_LANES == 16  // AVX-512
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
inline Vector load(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void load_pairs(const bfloat16* p, Vector& first, Vector& second) {  // p[0], p[2], ...; p[1], ...
  const __m512i raw = _mm512_loadu_si512(p);
  first = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(-65536)));
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
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }  // b beside a NaN
inline void store(Vector v, bfloat16* p) {  // to nearest even; a NaN stays one
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_srli_epi32(bits, 16);
  const __m512i more = _mm512_and_si512(odd, _mm512_set1_epi32(1));
  __m512i found = _mm512_add_epi32(bits, _mm512_add_epi32(more, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  found = _mm512_mask_or_epi32(found, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(found, 16)));
}
inline void store(Vector v, float16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __m256 fold(Vector v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

#elif CALR_LANES == 8  // AVX2
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
inline Vector load(const int8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void load_pairs(const bfloat16* p, Vector& first, Vector& second) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  first = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(-65536)));
}
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline void store(Vector v, bfloat16* p) {  // to nearest even; a NaN stays one
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_srli_epi32(bits, 16);
  const __m256i more = _mm256_and_si256(odd, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(more, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i found = _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, nan), 16);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(found, found), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
}
inline void store(Vector v, float16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 fold(Vector v) { return v; }

#else  // scalar
struct Vector {
  float lane[CALR_LANES];
};
inline Vector zero() { return Vector{}; }
inline Vector spread(float value) {
  Vector v;
  for (float& lane : v.lane) lane = value;
  return v;
}
template <typename W>
inline Vector load(const W* p) {
  Vector v;
  for (int i = 0; i < CALR_LANES; ++i) v.lane[i] = widen(p[i]);
  return v;
}
inline void load_pairs(const bfloat16* p, Vector& first, Vector& second) {
  for (int i = 0; i < CALR_LANES; ++i) {
    first.lane[i] = widen(p[2 * i]), second.lane[i] = widen(p[2 * i + 1]);
  }
}
template <typename X>
inline void store(const Vector& v, X* p) {
  for (int i = 0; i < CALR_LANES; ++i) narrow(v.lane[i], p + i);
}
inline Vector multiply(Vector a, const Vector& b) {
  for (int i = 0; i < CALR_LANES; ++i) a.lane[i] *= b.lane[i];
  return a;
}
inline Vector multiply_add(const Vector& a, const Vector& b, Vector c) {
  for (int i = 0; i < CALR_LANES; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline Vector larger(const Vector& a, Vector b) {
  for (int i = 0; i < CALR_LANES; ++i) b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return b;
}
inline void prefetch(const void*) {}
template <int COUNT>
inline void sums(const Vector* v, float* out) {
  for (int i = 0; i < COUNT; ++i) {
    out[i] = (v[i].lane[0] + v[i].lane[1]) + (v[i].lane[2] + v[i].lane[3]);
  }
}
#endif

#if CALR_LANES > 4
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

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
