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

// The levels of a group's codes, in place. Codes of 8 bits are the levels plus 128.
inline void look_up(const int8_t* table, uint8_t* codes, int64_t group, int32_t bits) {
  int8_t* levels = reinterpret_cast<int8_t*>(codes);
  if (bits == 8) {
    for (int64_t i = 0; i < group; ++i) codes[i] ^= 0x80;
    return;
  }
#if CALR_LANES > 4
  const __m256i low = _mm256_set1_epi8(15);
  const auto sixteen = [&](int at) {
    return _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * at)));
  };
  const __m256i first = sixteen(0);
  for (int64_t i = 0; i < group; i += 32) {
    __m256i* place = reinterpret_cast<__m256i*>(codes + i);
    const __m256i code = _mm256_loadu_si256(place);
    __m256i level = _mm256_shuffle_epi8(first, code);
    if (bits > 4) {
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(code, 4), low);
      for (int at = 1; at < 1 << (bits - 4); ++at) {
        const __m256i other = _mm256_shuffle_epi8(sixteen(at), code);
        const __m256i here = _mm256_cmpeq_epi8(high, _mm256_set1_epi8(static_cast<char>(at)));
        level = _mm256_blendv_epi8(level, other, here);
      }
    }
    _mm256_storeu_si256(place, level);
  }
#else
  for (int64_t i = 0; i < group; ++i) levels[i] = table[codes[i]];
#endif
}

// The levels of one record.
inline const int8_t* unpack(const uint8_t* record, const int8_t* table, uint8_t* codes, int64_t group,
                            int32_t bits) {
  const uint8_t* planes = record + kScaleBytes;
  std::memset(codes, 0, group);
  if (bits == 8) {
    std::memcpy(codes, planes, group);
  } else if (bits == 3) {
    add_plane<2>(planes, codes, group, 0);
    add_plane<1>(planes + group / 4, codes, group, 2);
  } else {
    add_plane<4>(planes, codes, group, 0);
    if (bits == 5) add_plane<1>(planes + group / 2, codes, group, 4);
    if (bits == 6) add_plane<2>(planes + group / 2, codes, group, 4);
  }
  look_up(table, codes, group, bits);
  return reinterpret_cast<const int8_t*>(codes);
}

inline float scale_of(const uint8_t* record) {
  float16 scale;
  std::memcpy(&scale, record, kScaleBytes);
  return widen(scale);
}

// out[j * out_stride] = one row of records times x[j] [groups * group], j below COLUMNS. Levels times
// inputs are summed over a group and multiplied by its scale once.
template <int COLUMNS>
inline void quantized_row(const uint8_t* row, const int8_t* table, const float* x, float* out,
                          int64_t groups, int64_t group, int32_t bits, uint8_t* codes,
                          int64_t out_stride) {
  const int64_t record = kScaleBytes + group * bits / 8, padded = groups * group;
  Vector total[COLUMNS];
  for (int j = 0; j < COLUMNS; ++j) total[j] = zero();
  for (int64_t g = 0; g < groups; ++g, row += record) {
    const int8_t* levels = unpack(row, table, codes, group, bits);
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
inline void quantized_dots(const uint8_t* records, const int8_t* table, const float* x, float* out,
                           int64_t m, int64_t n, int64_t groups, int64_t group, int32_t bits,
                           int64_t begin, int64_t end, uint8_t* codes) {
  const int64_t record = kScaleBytes + group * bits / 8, padded = groups * group;
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* at = records + row * groups * record;
    int64_t j = 0;
    for (; j + 4 <= m; j += 4) {
      quantized_row<4>(at, table, x + j * padded, out + j * n + row, groups, group, bits, codes, n);
    }
    for (; j < m; ++j) {
      quantized_row<1>(at, table, x + j * padded, out + j * n + row, groups, group, bits, codes, n);
    }
  }
}

// y [k]: one row of records as numbers: level * scale in float32, rounded to Y.
template <typename Y>
inline void dequantized_row(const uint8_t* row, const int8_t* table, Y* y, int64_t k, int64_t group,
                            int32_t bits, uint8_t* codes) {
  const int64_t record = kScaleBytes + group * bits / 8;
  for (int64_t start = 0; start < k; start += group, row += record) {
    const int8_t* levels = unpack(row, table, codes, group, bits);
    const float scale = scale_of(row);
    const int64_t count = k - start < group ? k - start : group;
    for (int64_t i = 0; i < count; ++i) {
      narrow(static_cast<float>(levels[i]) * scale, y + start + i);
    }
  }
}
