// Rounding of weights: levels by the cell in which a ratio of weight and scale lies. Levels are whole
// numbers from -128 to 127, so that the nearest one changes only at multiples of a half: 512 cells.

constexpr int64_t kCells = 512;
constexpr int64_t kLargestGroup = 4096;  // that a form may have
constexpr int64_t kBlock = 64;  // columns whose codes are chosen together

// The entries of cells for ratios; also the numbers of the cells, in places.
#if CALR_LANES == 16
inline Vector looked_up(const float* cells, Vector ratios, int32_t* places) {
  const Vector at = multiply_add(ratios, spread(2.0f), spread(kCells / 2));
  const Vector held = _mm512_max_ps(_mm512_min_ps(at, spread(kCells - 1)), zero());
  const __m512i found = _mm512_cvttps_epi32(held);
  _mm512_storeu_si512(places, found);
  return _mm512_i32gather_ps(found, cells, 4);
}
#elif CALR_LANES == 8
inline Vector looked_up(const float* cells, Vector ratios, int32_t* places) {
  const Vector at = multiply_add(ratios, spread(2.0f), spread(kCells / 2));
  const Vector held = _mm256_max_ps(_mm256_min_ps(at, spread(kCells - 1)), zero());
  const __m256i found = _mm256_cvttps_epi32(held);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(places), found);
  return _mm256_i32gather_ps(cells, found, 4);
}
#else
inline Vector looked_up(const float* cells, const Vector& ratios, int32_t* places) {
  Vector levels;
  for (int i = 0; i < CALR_LANES; ++i) {
    const float at = ratios.lane[i] * 2.0f + kCells / 2;
    const float held = at > 0.0f ? (at < kCells - 1 ? at : kCells - 1) : 0.0f;
    places[i] = static_cast<int32_t>(held);
    levels.lane[i] = cells[places[i]];
  }
  return levels;
}
#endif

inline int64_t lanes() { return CALR_LANES; }

inline float total(Vector v) {
  float found;
  sums<1>(&v, &found);
  return found;
}

// The scale, a number of float16 (where `coarse` of bfloat16, too), under which `count` weights err
// least, weighed by importance: of every ratio tried, the integers nearest to weights over that share of
// the largest one's scale get the scale that fits them best. most: the largest level.
inline float searched(const float* weights, const float* importance, int64_t count, const float* cells,
                      float most, const float* tried, int64_t choices, bool coarse) {
  float ratios[kLargestGroup], products[kLargestGroup], weighed[kLargestGroup], largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(weights[i]));
  if (largest == 0.0f) return 0.0f;
  const int64_t padded = (count + CALR_LANES - 1) / CALR_LANES * CALR_LANES;
  const float inverse = 1.0f / (largest / most);
  for (int64_t i = 0; i < padded; ++i) {
    const float weight = i < count ? weights[i] : 0.0f;
    weighed[i] = i < count ? importance[i] : 0.0f;
    ratios[i] = weight * inverse;
    products[i] = weight * weighed[i];
  }
  int32_t places[CALR_LANES];
  float best = 0.0f, gain = 0.0f;  // of the error of scale 0
  for (int64_t choice = 0; choice < choices; ++choice) {
    Vector along = zero(), energy = zero();
    const Vector factor = spread(1.0f / tried[choice]);
    for (int64_t i = 0; i < padded; i += CALR_LANES) {
      const Vector levels = looked_up(cells, multiply(load(ratios + i), factor), places);
      along = multiply_add(load(products + i), levels, along);
      energy = multiply_add(multiply(levels, levels), load(weighed + i), energy);
    }
    const float sum = total(along), squares = std::max(total(energy), 1e-30f);
    float fitted = rounded<float16>(sum / squares);
    if (coarse) fitted = rounded<float16>(rounded<bfloat16>(fitted));
    const float gained = fitted * (2.0f * sum - fitted * squares);
    if (gained > gain && std::isfinite(fitted)) {
      best = fitted;
      gain = gained;
    }
  }
  return best;
}

// Choose the codes of `count` rows, at most CALR_LANES, in b columns, at most kBlock, one after another.
// rest, spreads, codes, errors: [b, n], from the first of these rows. What a column's rounding lost, over
// the factor's diagonal, goes into errors and, times its row of the factor, off the columns behind it.
inline void chosen_columns(const float* rest, const float* spreads, const float* factor, int64_t stride,
                           const float* cells, const uint8_t* cell_codes, uint8_t* codes, float* errors,
                           int64_t b, int64_t n, int64_t count) {
  float tile[kBlock][CALR_LANES] = {}, scales[CALR_LANES] = {}, inverse[CALR_LANES] = {};
  int32_t places[CALR_LANES];
  for (int64_t i = 0; i < b; ++i) std::memcpy(tile[i], rest + i * n, count * sizeof(float));
  for (int64_t i = 0; i < b; ++i) {
    const float* row = factor + i * stride;
    std::memcpy(scales, spreads + i * n, count * sizeof(float));
    for (int j = 0; j < CALR_LANES; ++j) inverse[j] = scales[j] == 0.0f ? 0.0f : 1.0f / scales[j];
    const Vector weights = load(tile[i]);
    const Vector levels = looked_up(cells, multiply(weights, load(inverse)), places);
    const Vector lost = multiply_add(multiply(levels, load(scales)), spread(-1.0f), weights);
    const Vector error = multiply(lost, spread(1.0f / row[i]));
    for (int64_t later = i + 1; later < b; ++later) {
      store(multiply_add(error, spread(-row[later]), load(tile[later])), tile[later]);
    }
    store(error, inverse);
    std::memcpy(errors + i * n, inverse, count * sizeof(float));
    for (int64_t j = 0; j < count; ++j) codes[i * n + j] = cell_codes[places[j]];
  }
}
