// Quantised matrices: records into levels, and their dot products with inputs.
//
// A record is the scale of a group of weights, float16, and their codes in planes of 8, 4, 2 and 1
// bits, the lowest first; byte i of a plane of b bits holds the codes of weights i, i + S, i + 2S …,
// S = group * b / 8. A code's level is an int8 from a table of 64 (of 2^bits; the rest is not read).

constexpr int64_t kScaleBytes = 2;
constexpr int64_t kTable = 64;  // levels of the widest code that is looked up

// Add a plane of B bits to the codes of a group, a multiple of 32, at a shift.
template <int B>
inline void add_plane(const uint8_t* plane, uint8_t* codes, int64_t group, int shift) {
  const int64_t size = group * B / 8;  // a multiple of 4
  constexpr uint32_t kMask = ((1u << B) - 1) * 0x01010101u;
  for (int part = 0; part < 8 / B; ++part) {
    uint8_t* out = codes + part * size;
    for (int64_t i = 0; i < size; i += 4) {
      uint32_t word, found;
      std::memcpy(&word, plane + i, 4);
      std::memcpy(&found, out + i, 4);
      found |= ((word >> (part * B)) & kMask) << shift;
      std::memcpy(out + i, &found, 4);
    }
  }
}

// The planes of a code of BITS bits: LOW bits first, then HIGH.
template <int BITS>
struct Planes {
  static constexpr int kLow = BITS == 3 ? 2 : BITS == 8 ? 8 : 4;
  static constexpr int kHigh = BITS - kLow;
};

#if CALR_LANES > 4
// The codes of weights [at, at + 32) in a plane of B bits of a group that is a power of two.
template <int B>
inline __m256i plane_codes(const uint8_t* plane, int64_t group, int64_t at) {
  const int64_t size = group * B / 8;
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << B) - 1));
  if (size >= 32) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane + at % size));
    const __m128i by = _mm_cvtsi64_si128(at / size * B);
    return _mm256_and_si256(_mm256_srl_epi16(raw, by), mask);
  }
  const int64_t part = at / size * B;  // bits to shift by, of the first weight
  if (size == 16) {
    const __m256i raw = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)));
    const __m256i by = _mm256_set_epi64x(part + B, part + B, part, part);
    return _mm256_and_si256(_mm256_srlv_epi64(raw, by), mask);
  }
  if (size == 8) {
    int64_t word;
    std::memcpy(&word, plane, 8);
    const __m256i by = _mm256_set_epi64x(part + 3 * B, part + 2 * B, part + B, part);
    return _mm256_and_si256(_mm256_srlv_epi64(_mm256_set1_epi64x(word), by), mask);
  }
  int32_t word;
  std::memcpy(&word, plane, 4);
  const __m256i by = _mm256_set_epi32(7 * B, 6 * B, 5 * B, 4 * B, 3 * B, 2 * B, B, 0);
  return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), by), mask);
}

// The levels of codes of BITS bits: a byte shuffle for every sixteen of the table.
template <int BITS>
inline __m256i look_up(const int8_t* table, __m256i code) {
  if (BITS == 8) return _mm256_xor_si256(code, _mm256_set1_epi8(static_cast<char>(0x80)));
  const auto of = [&](int part) {
    const __m128i* sixteen = reinterpret_cast<const __m128i*>(table + 16 * part);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(sixteen)), code);
  };
  __m256i level = of(0);
  if (BITS > 4) {  // the bits above the fourth, moved to where a blend looks for them
    const __m256i fifth = _mm256_slli_epi16(code, 3);
    level = _mm256_blendv_epi8(level, of(1), fifth);
    if (BITS == 6) {
      const __m256i upper = _mm256_blendv_epi8(of(2), of(3), fifth);
      level = _mm256_blendv_epi8(level, upper, _mm256_slli_epi16(code, 2));
    }
  }
  return level;
}
#endif

// The codes of one record.
template <int BITS>
inline void record_codes(const uint8_t* record, uint8_t* codes, int64_t group) {
  constexpr int kLow = Planes<BITS>::kLow, kHigh = Planes<BITS>::kHigh;
  const uint8_t* low = record + kScaleBytes;
  std::memset(codes, 0, group);
  add_plane<kLow>(low, codes, group, 0);
  if (kHigh > 0) add_plane<kHigh ? kHigh : 1>(low + group * kLow / 8, codes, group, kLow);
}

// The levels of one record, in a buffer for a group.
template <int BITS>
inline const int8_t* unpack(const uint8_t* record, const int8_t* table, uint8_t* codes,
                            int64_t group) {
#if CALR_LANES > 4
  constexpr int kLow = Planes<BITS>::kLow, kHigh = Planes<BITS>::kHigh;
  const uint8_t* low = record + kScaleBytes;
  const uint8_t* high = low + group * kLow / 8;
  if ((group & (group - 1)) == 0) {
    for (int64_t at = 0; at < group; at += 32) {
      __m256i code = plane_codes<kLow>(low, group, at);
      if (kHigh > 0) {
        const __m256i above = plane_codes<kHigh ? kHigh : 1>(high, group, at);
        code = _mm256_or_si256(code, _mm256_slli_epi16(above, kLow));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + at), look_up<BITS>(table, code));
    }
    return reinterpret_cast<const int8_t*>(codes);
  }
#endif
  record_codes<BITS>(record, codes, group);
  int8_t* levels = reinterpret_cast<int8_t*>(codes);
  for (int64_t i = 0; i < group; ++i) {
    levels[i] = BITS == 8 ? static_cast<int8_t>(codes[i] ^ 0x80) : table[codes[i]];
  }
  return levels;
}

inline float scale_of(const uint8_t* record) {
  float16 scale;
  std::memcpy(&scale, record, kScaleBytes);
#if CALR_LANES > 4
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(scale.bits)));
#else
  return widen(scale);
#endif
}

// out[j * out_stride] = one row of records times x[j] [groups * group], j below COLUMNS. Levels times
// inputs are summed over a group and multiplied by its scale once.
template <int BITS, int COLUMNS>
inline void quantized_row(const uint8_t* row, const int8_t* table, const float* x, float* out,
                          int64_t groups, int64_t group, uint8_t* codes, int64_t out_stride) {
  const int64_t record = kScaleBytes + group * BITS / 8, padded = groups * group;
  Vector total[COLUMNS];
  for (int j = 0; j < COLUMNS; ++j) total[j] = zero();
  for (int64_t g = 0; g < groups; ++g, row += record) {
    const int8_t* levels = unpack<BITS>(row, table, codes, group);
    Vector sum[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) sum[j] = zero();
    for (int64_t i = 0; i < group; i += CALR_LANES) {
      const Vector level = load(levels + i);
      for (int j = 0; j < COLUMNS; ++j) {
        sum[j] = multiply_add(level, load(x + j * padded + g * group + i), sum[j]);
      }
    }
    const Vector scale = spread(scale_of(row));
    for (int j = 0; j < COLUMNS; ++j) total[j] = multiply_add(scale, sum[j], total[j]);
  }
  for (int j = 0; j < COLUMNS; ++j) sums<1>(total + j, out + j * out_stride);
}

// out [m, n]: rows [begin, end) of records [n, groups] times x [m, groups * group].
template <int BITS>
void quantized_dots(const uint8_t* records, const int8_t* table, const float* x, float* out, int64_t m,
                    int64_t n, int64_t groups, int64_t group, int64_t begin, int64_t end,
                    uint8_t* codes) {
  const int64_t record = kScaleBytes + group * BITS / 8, padded = groups * group;
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* at = records + row * groups * record;
    int64_t j = 0;
    for (; j + 4 <= m; j += 4) {
      quantized_row<BITS, 4>(at, table, x + j * padded, out + j * n + row, groups, group, codes, n);
    }
    for (; j < m; ++j) {
      quantized_row<BITS, 1>(at, table, x + j * padded, out + j * n + row, groups, group, codes, n);
    }
  }
}

// y [k]: one row of records as numbers: level * scale in float32, rounded to Y. scales: of its groups,
// null for the records' own.
template <int BITS, typename Y>
void dequantized_row(const uint8_t* row, const float* scales, const int8_t* table, Y* y, int64_t k,
                     int64_t group, uint8_t* codes) {
  const int64_t record = kScaleBytes + group * BITS / 8;
  for (int64_t start = 0; start < k; start += group, row += record) {
    const int8_t* levels = unpack<BITS>(row, table, codes, group);
    const float scale = scales ? scales[start / group] : scale_of(row);
    const int64_t count = k - start < group ? k - start : group;
    int64_t i = 0;
    for (; i + CALR_LANES <= count; i += CALR_LANES) {
      store(multiply(load(levels + i), spread(scale)), y + start + i);
    }
    for (; i < count; ++i) narrow(static_cast<float>(levels[i]) * scale, y + start + i);
  }
}

// found [groups]: the levels of one row of records times values [k], summed by groups.
template <int BITS, typename X>
void level_sums(const uint8_t* row, const int8_t* table, const X* values, float* found, int64_t k,
                int64_t group, uint8_t* codes) {
  const int64_t record = kScaleBytes + group * BITS / 8;
  for (int64_t start = 0; start < k; start += group, row += record) {
    const int8_t* levels = unpack<BITS>(row, table, codes, group);
    const int64_t count = k - start < group ? k - start : group;
    Vector sum = zero();
    int64_t i = 0;
    for (; i + CALR_LANES <= count; i += CALR_LANES) {
      sum = multiply_add(load(levels + i), load(values + start + i), sum);
    }
    float total;
    sums<1>(&sum, &total);
    for (; i < count; ++i) total += static_cast<float>(levels[i]) * widen(values[start + i]);
    found[start / group] = total;
  }
}
