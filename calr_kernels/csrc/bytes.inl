// Vectors of the codes of a panel, CALR_LANES rows of a quad each, and of sums of integers: what
// panels.inl is written with. A panel is 16 rows, a quad four columns of it.

constexpr int64_t kPanel = 16, kChunk = 32, kQuad = 4;  // rows; columns of all planes, and of a quad
constexpr int kQuads = kChunk / kQuad;
constexpr int kVectors = kPanel / CALR_LANES;  // that hold one number a row
constexpr int kBytes = kQuad * CALR_LANES;     // of codes in a vector of bytes
constexpr int64_t kLine = 64;                  // bytes of a line of the cache

#if CALR_LANES == 16
using Bytes = __m512i;
struct Counts {  // of inputs split in two bytes with signs
  __m512i high, low;
};
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline Counts counts(const int32_t* values) {
  return {_mm512_set1_epi32(values[0]), _mm512_set1_epi32(values[1])};
}
inline Bytes sixteen(const int8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int FROM, int TO, int BITS>  // the bits from FROM up, at TO
inline Bytes bits_at(Bytes v) {
  v = FROM > TO ? _mm512_srli_epi16(v, FROM - TO) : _mm512_slli_epi16(v, TO - FROM);
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(((1 << BITS) - 1) << TO)));
}
inline Bytes joined(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes shuffled(Bytes table, Bytes code) { return _mm512_shuffle_epi8(table, code); }
template <int BIT>  // b where a bit of v is set, else a
inline Bytes choose(Bytes a, Bytes b, Bytes v) {
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(_mm512_slli_epi16(v, 7 - BIT)), a, b);
}
inline Bytes flipped(Bytes v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
inline void add_products(Bytes levels, int32_t high, int32_t low, Counts& sum) {
  sum.high = _mm512_dpbusd_epi32(sum.high, levels, _mm512_set1_epi32(high));
  sum.low = _mm512_dpbusd_epi32(sum.low, levels, _mm512_set1_epi32(low));
}
inline Vector to_floats(const Counts& v) {  // of groups of at most 512: 512 * 128 * kMost is below 2^31
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(v.high, 8), v.low));
}
template <int COLUMN>
inline Vector column(Bytes v) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * COLUMN), 24));
}

#elif CALR_LANES == 8
using Bytes = __m256i;
using Counts = __m256i;
inline Bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline Counts counts(const int32_t* values) { return _mm256_set1_epi32(values[0]); }
inline Bytes sixteen(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int FROM, int TO, int BITS>  // the bits from FROM up, at TO
inline Bytes bits_at(Bytes v) {
  v = FROM > TO ? _mm256_srli_epi16(v, FROM - TO) : _mm256_slli_epi16(v, TO - FROM);
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(((1 << BITS) - 1) << TO)));
}
inline Bytes joined(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes shuffled(Bytes table, Bytes code) { return _mm256_shuffle_epi8(table, code); }
template <int BIT>
inline Bytes choose(Bytes a, Bytes b, Bytes v) {
  return _mm256_blendv_epi8(a, b, _mm256_slli_epi16(v, 7 - BIT));
}
inline Bytes flipped(Bytes v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
inline Bytes even(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi16(255)); }
inline Bytes odd(Bytes v) { return _mm256_srli_epi16(v, 8); }
inline void add_pairs(Bytes levels, int32_t pair, Counts& sum) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(levels, _mm256_set1_epi32(pair)));
  asm("" : "+v"(sum));  // or the compiler adds all products at the end, and keeps them in memory
}
inline Vector to_floats(Counts v) { return _mm256_cvtepi32_ps(v); }
template <int COLUMN>
inline Vector column(Bytes v) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * COLUMN), 24));
}

#else  // scalar
struct Bytes {
  uint8_t lane[kBytes];
};
struct Pairs {
  int16_t lane[kBytes / 2];
};
struct Counts {
  uint32_t lane[CALR_LANES];  // of int32: sums wrap
};
inline Bytes load_bytes(const void* p) {
  Bytes v;
  std::memcpy(v.lane, p, kBytes);
  return v;
}
inline Counts counts(const int32_t* values) {
  Counts v;
  for (uint32_t& lane : v.lane) lane = static_cast<uint32_t>(values[0]);
  return v;
}
inline Bytes sixteen(const int8_t* p) { return load_bytes(p); }
template <int FROM, int TO, int BITS>
inline Bytes bits_at(Bytes v) {
  for (uint8_t& lane : v.lane) lane = static_cast<uint8_t>((lane >> FROM & ((1 << BITS) - 1)) << TO);
  return v;
}
inline Bytes joined(Bytes a, Bytes b) {
  for (int i = 0; i < kBytes; ++i) a.lane[i] |= b.lane[i];
  return a;
}
inline Bytes shuffled(Bytes table, Bytes code) {
  for (uint8_t& lane : code.lane) lane = table.lane[lane & 15];
  return code;
}
template <int BIT>
inline Bytes choose(Bytes a, Bytes b, Bytes v) {
  for (int i = 0; i < kBytes; ++i) a.lane[i] = v.lane[i] >> BIT & 1 ? b.lane[i] : a.lane[i];
  return a;
}
inline Bytes flipped(Bytes v) {
  for (uint8_t& lane : v.lane) lane ^= 128;
  return v;
}
template <int FIRST>
inline Pairs every_second(Bytes v) {
  Pairs pairs;
  for (int i = 0; i < kBytes / 2; ++i) pairs.lane[i] = v.lane[2 * i + FIRST];
  return pairs;
}
inline Pairs even(Bytes v) { return every_second<0>(v); }
inline Pairs odd(Bytes v) { return every_second<1>(v); }
inline void add_pairs(const Pairs& levels, int32_t pair, Counts& sum) {
  int16_t x[2];
  std::memcpy(x, &pair, 4);
  for (int i = 0; i < CALR_LANES; ++i) {
    sum.lane[i] += static_cast<uint32_t>(levels.lane[2 * i] * x[0]);
    sum.lane[i] += static_cast<uint32_t>(levels.lane[2 * i + 1] * x[1]);
  }
}
inline Vector to_floats(Counts v) {
  Vector found;
  for (int i = 0; i < CALR_LANES; ++i) found.lane[i] = static_cast<float>(static_cast<int32_t>(v.lane[i]));
  return found;
}
template <int COLUMN>
inline Vector column(Bytes v) {
  Vector found;
  for (int i = 0; i < CALR_LANES; ++i) found.lane[i] = static_cast<int8_t>(v.lane[kQuad * i + COLUMN]);
  return found;
}
#endif

// Sixteen inputs times `inverse`, which makes them at most kMost, as integers of 16 bits, for each quad two
// int32 as `add_products` takes them: of high and low bytes, both with signs, or of the integers 0, 2 and
// 1, 3. Sums: of what either holds, over all quads.
#if CALR_LANES == 16
constexpr float kMost = 32512.0f;  // whose high byte is 127
using Sums = Counts;
inline Sums no_sums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
inline void totals(const Sums& sums, int32_t (&found)[2]) {
  found[0] = _mm512_reduce_add_epi32(sums.high), found[1] = _mm512_reduce_add_epi32(sums.low);
}
inline void arrange(const float* x, float inverse, int16_t* out, Sums& sums) {
  const __m512i both = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse)));
  const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(both, 24), 24);
  const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(both, low), 8);
  sums.high = _mm512_add_epi32(sums.high, high), sums.low = _mm512_add_epi32(sums.low, low);
  const __m128i highs = _mm512_cvtepi32_epi8(high), lows = _mm512_cvtepi32_epi8(low);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi32(highs, lows));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm_unpackhi_epi32(highs, lows));
}
#else
constexpr float kMost = 32767.0f;
using Sums = int32_t;
inline Sums no_sums() { return 0; }
inline void totals(Sums sums, int32_t (&found)[2]) { found[0] = sums, found[1] = 0; }
inline void arrange(const float* x, float inverse, int16_t* out, Sums& sums) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  for (int i = 0; i < kPanel; ++i) {
    const float shifted = x[i] * inverse + shift;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    const auto found = static_cast<int16_t>(bits - 0x4b400000);
    const int at = i % kQuad;
    out[i - at + at / 2 + at % 2 * 2] = found;
    sums += found;
  }
}
inline void add_products(Bytes levels, int32_t first, int32_t second, Counts& sum) {
  add_pairs(even(levels), first, sum);
  add_pairs(odd(levels), second, sum);
}
#endif
