// A number of bits as a constant.
#pragma once

#include <cstdint>
#include <type_traits>

namespace {

// Call run with the number of bits, 3, 4, 5, 6 or 8, as a constant.
template <typename Run>
void of_bits(int32_t bits, const Run& run) {
  if (bits == 3) {
    run(std::integral_constant<int, 3>{});
  } else if (bits == 4) {
    run(std::integral_constant<int, 4>{});
  } else if (bits == 5) {
    run(std::integral_constant<int, 5>{});
  } else if (bits == 6) {
    run(std::integral_constant<int, 6>{});
  } else {
    run(std::integral_constant<int, 8>{});
  }
}

}  // namespace
