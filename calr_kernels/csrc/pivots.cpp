// Pivots, the outputs that are down x itself: where the others are, and both in their places.

#include <cstdint>
#include <vector>

#include "calr.h"
#include "team.h"

namespace {

// Rows [begin, end) of y.
template <typename Element>
void interleave(const Element* t, const Element* rest, const int32_t* pivots,
                const int32_t* others, Element* y, int64_t n, int64_t r, int64_t begin,
                int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    Element* out = y + row * n;
    for (int64_t i = 0; i < r; ++i) out[pivots[i]] = t[row * r + i];
    for (int64_t i = 0; i < n - r; ++i) out[others[i]] = rest[row * (n - r) + i];
  }
}

}  // namespace

int32_t calr_complement(const int32_t* pivots, int32_t* others, int64_t n, int64_t r) {
  thread_local std::vector<int32_t> marks;
  marks.assign(n, 1);
  int32_t* left = marks.data();
  for (int64_t i = 0; i < r; ++i) {
    if (pivots[i] < 0 || pivots[i] >= n || !left[pivots[i]]) return -1;
    left[pivots[i]] = 0;
  }
  int64_t count = 0;
  for (int64_t row = 0; count < n - r; ++row) {  // no branch: which rows are left is random
    others[count] = static_cast<int32_t>(row);
    count += left[row];
  }
  return 0;
}

int32_t calr_interleave(const void* t, const void* rest, const int32_t* pivots, void* y, int64_t m,
                        int64_t n, int64_t r, int32_t element_size, int32_t threads) {
  std::vector<int32_t> others(n);
  if (calr_complement(pivots, others.data(), n, r)) return -1;
  calr::parallel(threads, m, n, [&](int64_t begin, int64_t end) {
    if (element_size == 2) {
      interleave(static_cast<const uint16_t*>(t), static_cast<const uint16_t*>(rest), pivots,
                 others.data(), static_cast<uint16_t*>(y), n, r, begin, end);
    } else {
      interleave(static_cast<const uint32_t*>(t), static_cast<const uint32_t*>(rest), pivots,
                 others.data(), static_cast<uint32_t*>(y), n, r, begin, end);
    }
  });
  return 0;
}
