// Quantised matrices in panels, and their products with inputs.
//
// A panel is 16 rows, so that the lanes of a vector are rows and no sum runs across lanes. For every
// scale group it holds the 16 scales, float16, and for every 32 columns the planes of their codes, the
// lowest bits first. A quad is 64 codes, [16 rows][4 columns]; a plane of b bits holds the eight quads of
// 32 columns in b blocks of 64 bytes, quad i in block i * b / 8, from bit i * b % 8 up.
//
// Levels are counted from -128, as bytes without a sign: an input's sums are corrected once a group.

constexpr int kInputs = CALR_LANES == 16 ? 8 : 4;  // that a panel is multiplied by at once

// The levels of one vector of a quad, from the planes of its chunk.
template <int BITS, int QUAD>
inline Bytes quad_levels(const uint8_t* chunk, const Bytes* tables) {
  constexpr int kLow = Planes<BITS>::kLow, kHigh = Planes<BITS>::kHigh, kFrom = QUAD * kHigh % 8;
  const Bytes low = load_bytes(chunk + QUAD * kLow / 8 * 64);
  if constexpr (BITS == 8) return low;
  Bytes code = bits_at<QUAD * kLow % 8, 0, kLow>(low);
  if constexpr (BITS == 4) return shuffled(tables[0], code);
  const Bytes high = load_bytes(chunk + kLow * 64 + QUAD * kHigh / 8 * 64);
  if constexpr (BITS == 3) return shuffled(tables[0], joined(code, bits_at<kFrom, 2, 1>(high)));
  if constexpr (BITS > 4) {
    const Bytes lower = choose<kFrom>(shuffled(tables[0], code), shuffled(tables[1], code), high);
    if constexpr (BITS == 5) return lower;
    if constexpr (BITS == 6) {
      const Bytes upper = choose<kFrom>(shuffled(tables[2], code), shuffled(tables[3], code), high);
      return choose<kFrom + 1>(lower, upper, high);
    }
  }
}

// Add a quad's levels times inputs: in integers, arranged, or in float32.
inline void accumulate(Bytes levels, const int16_t* x, Counts& sum) {
  int32_t first, second;
  std::memcpy(&first, x, 4);
  std::memcpy(&second, x + 2, 4);
  add_products(levels, first, second, sum);
}
inline void accumulate(Bytes levels, const float* x, Vector& sum) {
  levels = flipped(levels);
  sum = multiply_add(column<0>(levels), spread(x[0]), sum);
  sum = multiply_add(column<1>(levels), spread(x[1]), sum);
  sum = multiply_add(column<2>(levels), spread(x[2]), sum);
  sum = multiply_add(column<3>(levels), spread(x[3]), sum);
}
inline Counts start(const int16_t*, const int32_t* offsets) { return counts(offsets); }
inline Vector start(const float*, const int32_t*) { return zero(); }
inline Vector to_floats(const Vector& v) { return v; }

template <int BITS, int COLUMNS, int QUAD, typename X, typename Sum>
inline void quad_products(const uint8_t* chunk, const Bytes* tables, const X* x,
                          Sum (&sum)[COLUMNS][kVectors]) {
  for (int part = 0; part < kVectors; ++part) {
    const Bytes levels = quad_levels<BITS, QUAD>(chunk + part * kBytes, tables);
    for (int j = 0; j < COLUMNS; ++j) accumulate(levels, x + j * kChunk + QUAD * kQuad, sum[j][part]);
  }
  if constexpr (QUAD + 1 < kQuads) {
    quad_products<BITS, COLUMNS, QUAD + 1>(chunk, tables, x, sum);
  }
}

// What goes with an input in scale groups: scales [groups], and -128 times its sums [groups, 2].
struct Groups {
  const float* scales;
  const int32_t* offsets;
};

// out[j * out_stride + row] = a panel's rows times inputs x, as `group_inputs` leaves COLUMNS of them, j
// below that. lines: of the cache, to fetch with each group from `next` on.
template <int BITS, int COLUMNS, typename X>
void panel_products(const uint8_t* panel, const int8_t* table, const X* x, Groups of_x, float* out,
                    int64_t groups, int64_t group, int64_t out_stride, const uint8_t* next, int64_t lines) {
  constexpr int kTables = BITS == 6 ? 4 : BITS == 5 ? 2 : 1;
  // bytes: an EPYC of Zen 3 stops its own prefetching at pages; one of Zen 4 reads a fifth slower with this
  constexpr int64_t kAhead = CALR_LANES == 16 ? 0 : 1024;
  Bytes tables[kTables];
  for (int i = 0; i < kTables; ++i) tables[i] = flipped(sixteen(table + 16 * i));
  Vector total[COLUMNS][kVectors];
  for (int j = 0; j < COLUMNS; ++j) {
    for (int part = 0; part < kVectors; ++part) total[j][part] = zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* scales = panel;
    for (int64_t line = 0; line < lines; ++line, next += kLine) prefetch(next);
    panel += kScaleBytes * kPanel;
    decltype(start(x, nullptr)) sum[COLUMNS][kVectors];
    for (int j = 0; j < COLUMNS; ++j) {
      const int32_t* offsets = of_x.offsets + 2 * (j * groups + g);
      for (int part = 0; part < kVectors; ++part) sum[j][part] = start(x, offsets);
    }
    for (int64_t at = 0; at < group; at += kChunk, panel += 64 * BITS) {
      for (int line = 0; kAhead && line < BITS; ++line) prefetch(panel + kAhead + kLine * line);
      quad_products<BITS, COLUMNS, 0>(panel, tables, x + (g * group + at) * COLUMNS, sum);
    }
    for (int part = 0; part < kVectors; ++part) {
      const Vector scale = load(reinterpret_cast<const float16*>(scales) + part * CALR_LANES);
      for (int j = 0; j < COLUMNS; ++j) {
        const Vector both = multiply(scale, spread(of_x.scales[j * groups + g]));
        total[j][part] = multiply_add(to_floats(sum[j][part]), both, total[j][part]);
      }
    }
  }
  for (int j = 0; j < COLUMNS; ++j) {
    for (int part = 0; part < kVectors; ++part) {
      store(total[j][part], out + j * out_stride + part * CALR_LANES);
    }
  }
}

// out [m, out_stride]: panels [begin, end) times m inputs as `group_inputs` leaves them; out's rows have room
// for whole panels.
template <int BITS, typename X>
void panels_products(const uint8_t* panels, const int8_t* table, const X* x, const float* x_scales,
                     const int32_t* x_offsets, float* out, int64_t m, int64_t groups, int64_t group,
                     int64_t out_stride, int64_t begin, int64_t end) {
  const int64_t bytes = groups * (kScaleBytes * kPanel + kPanel * group * BITS / 8);
  const int64_t padded = groups * group;
  // With many inputs a panel is worked on for longer than it takes to fetch one: the next one, meanwhile,
  // some of it with each of its turns. With few, reading is what takes the time.
  const int64_t turns = (m + kInputs - 1) / kInputs, share = (bytes / kLine + turns) / turns;
  const int64_t lines = m > 4 ? (share + groups - 1) / groups : 0;
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint8_t* at = panels + panel * bytes;
    float* to = out + panel * kPanel;
    in_tiles<kInputs>(m, [&](int64_t j, auto columns) {
      const Groups of_x{x_scales + j * groups, x_offsets + 2 * j * groups};
      const uint8_t* next = at + bytes + j / kInputs * share * kLine;
      panel_products<BITS, decltype(columns)::value>(at, table, x + j * padded, of_x, to + j * out_stride,
                                                     groups, group, out_stride, next, lines);
    });
  }
}

// An input of a scale group as integers of 16 bits times a scale, as `accumulate` takes them: to within
// 2^-16 of the largest, which 16-bit numbers do not notice. What is not finite makes the scale NaN.
// Numbers below 1e-30 count as 0. Every 32 of them lie `stride` elements behind the last. Returns the
// scale; offsets [2]: -128 times their sums.
inline float take_group(const float* x, int16_t* out, int64_t group, int64_t stride, int32_t* offsets) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < group; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float most, inverse = 0.0f;
  std::memcpy(&most, &largest, 4);
  if (largest < 0x7f800000 && most > 1e-30f) inverse = kMost / most;
  Sums sums = no_sums();
  for (int64_t i = 0; i < group; i += kPanel) arrange(x + i, inverse, out + i / kChunk * stride + i % kChunk, sums);
  int32_t found[2];
  totals(sums, found);
  for (int i = 0; i < 2; ++i) offsets[i] = static_cast<int32_t>(-128 * static_cast<int64_t>(found[i]));
  if (largest >= 0x7f800000) return most - most;  // NaN
  return inverse ? most / kMost : 0.0f;
}

// The same in float32: as it is.
inline float take_group(const float* x, float* out, int64_t group, int64_t stride, int32_t*) {
  for (int64_t i = 0; i < group; i += kChunk) std::copy_n(x + i, kChunk, out + i / kChunk * stride);
  return 1.0f;
}

// Inputs x [m, k] as panels are multiplied by them: of those that are at once, 32 columns behind one another,
// [groups * group / 32][inputs][32], and what goes with each, `Groups`. padded [group]: room for the last one.
template <typename X>
void group_inputs(const float* x, X* out, float* scales, int32_t* offsets, int64_t m, int64_t k, int64_t group,
                  float* padded) {
  const int64_t groups = (k + group - 1) / group;
  in_tiles<kInputs>(m, [&](int64_t first, auto columns) {
    constexpr int kAtOnce = decltype(columns)::value;
    X* tile = out + first * groups * group;
    for (int64_t j = 0; j < kAtOnce; ++j) {
      const float* own = x + (first + j) * k;
      for (int64_t g = 0; g < groups; ++g, own += group, ++scales, offsets += 2) {
        const int64_t rest = k - g * group;
        if (rest < group) std::fill(std::copy_n(own, rest, padded), padded + group, 0.0f);
        *scales = take_group(rest < group ? padded : own, tile + g * group * kAtOnce + j * kChunk, group,
                             kAtOnce * kChunk, offsets);
      }
    }
  });
}

// Add to out [count], the outputs from `first` on, a multiple of 16: weights t [c] times terms
// [groups, c], records of 8 bits in groups of 32 whose codes are levels. weights: [c].
inline void add_terms(const uint8_t* terms, const float* t, float* out, int64_t c, int64_t first,
                      int64_t count, float* weights) {
  constexpr int64_t kRecord = kScaleBytes + kChunk;
  for (int64_t at = 0; at < count; at += kPanel) {
    const uint8_t* records = terms + (first + at) / kChunk * c * kRecord;
    if (at == 0 || (first + at) % kChunk == 0) {
      for (int64_t i = 0; i < c; ++i) weights[i] = t[i] * scale_of(records + i * kRecord);
    }
    const uint8_t* levels = records + kScaleBytes + (first + at) % kChunk;
    Vector sum[kVectors];
    for (int part = 0; part < kVectors; ++part) sum[part] = zero();
    for (int64_t i = 0; i < c; ++i, levels += kRecord) {
      const Vector weight = spread(weights[i]);
      for (int part = 0; part < kVectors; ++part) {
        const auto* from = reinterpret_cast<const int8_t*>(levels) + part * CALR_LANES;
        sum[part] = multiply_add(weight, load(from), sum[part]);
      }
    }
    float added[kPanel];
    for (int part = 0; part < kVectors; ++part) store(sum[part], added + part * CALR_LANES);
    const int64_t size = count - at < kPanel ? count - at : kPanel;
    for (int64_t i = 0; i < size; ++i) out[at + i] += added[i];
  }
}

// Add a plane of B bits, those of the codes [16, group] from a shift up, to a chunk's place.
template <int B>
inline void pack_plane(const uint8_t* codes, uint8_t* plane, int64_t group, int shift) {
  for (int64_t row = 0; row < kPanel; ++row) {
    for (int64_t i = 0; i < kChunk; ++i) {
      const int64_t quad = i / kQuad, byte = quad * B / 8 * 64 + row * kQuad + i % kQuad;
      const int code = codes[row * group + i] >> shift & ((1 << B) - 1);
      plane[byte] = static_cast<uint8_t>(plane[byte] | code << quad * B % 8);
    }
  }
}

// Panels [begin, end) of records [n, groups]; rows beyond the last have scale 0. codes: [16 * group].
template <int BITS>
void pack_panels(const uint8_t* records, uint8_t* panels, int64_t n, int64_t groups, int64_t group,
                 int64_t begin, int64_t end, uint8_t* codes) {
  constexpr int kLow = Planes<BITS>::kLow, kHigh = Planes<BITS>::kHigh;
  const int64_t record = kScaleBytes + group * BITS / 8;
  uint8_t* out = panels + begin * groups * kPanel * record;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t g = 0; g < groups; ++g, out += kPanel * record) {
      std::memset(out, 0, kPanel * record);
      std::memset(codes, 0, kPanel * group);
      for (int64_t row = 0; row < kPanel && panel * kPanel + row < n; ++row) {
        const uint8_t* from = records + ((panel * kPanel + row) * groups + g) * record;
        std::memcpy(out + row * kScaleBytes, from, kScaleBytes);
        record_codes<BITS>(from, codes + row * group, group);
      }
      uint8_t* chunk = out + kScaleBytes * kPanel;
      for (int64_t at = 0; at < group; at += kChunk, chunk += 64 * BITS) {
        pack_plane<kLow>(codes + at, chunk, group, 0);
        if (kHigh > 0) pack_plane<kHigh ? kHigh : 1>(codes + at, chunk + 64 * kLow, group, kLow);
      }
    }
  }
}
