// Threads: those of the OpenMP runtime that torch has loaded, so that no second pool competes for
// the same cores (idle workers of both would spin against each other). The library is not linked to
// an OpenMP runtime; without one in the process everything runs on one thread.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}
#endif

namespace calr {

constexpr int64_t kWorthwhile = 32768;  // operations below which a second thread costs more

template <typename Run>
struct Parts {
  const Run* run;
  int64_t parts, count;
};

template <typename Run>
void run_part(const Parts<Run>& all, int64_t part) {
  const int64_t begin = all.count * part / all.parts, end = all.count * (part + 1) / all.parts;
  if (begin < end) (*all.run)(begin, end);
}

// Split [0, count) into at most `threads` contiguous parts of similar size and run them all.
// work: operations per item; too little work stays on the calling thread.
template <typename Run>
void parallel(int32_t threads, int64_t count, int64_t work, const Run& run) {
  const int64_t useful = std::min<int64_t>(threads, count * work / kWorthwhile);
  Parts<Run> all{&run, std::max<int64_t>(1, std::min(useful, count)), count};
#if defined(__linux__)
  if (all.parts > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
    auto body = [](void* data) {  // the runtime may give fewer threads than asked for
      const auto& shared = *static_cast<const Parts<Run>*>(data);
      const int64_t step = omp_get_num_threads();
      for (int64_t part = omp_get_thread_num(); part < shared.parts; part += step) {
        run_part(shared, part);
      }
    };
    GOMP_parallel(body, &all, static_cast<unsigned>(all.parts), 0);
    return;
  }
#endif
  for (int64_t part = 0; part < all.parts; ++part) run_part(all, part);
}

}  // namespace calr
