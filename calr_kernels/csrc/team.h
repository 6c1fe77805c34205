// Threads: those of the OpenMP runtime that torch has loaded, so that no second pool competes for
// the same cores (idle workers of both would spin against each other). The library is not linked to
// an OpenMP runtime; without one in the process everything runs on one thread.
//
// Not to be used in a child of fork() whose parent has used it: OpenMP's own threads are gone there.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}
#endif

namespace calr {

constexpr int64_t kWorthwhile = 32768;  // operations below which a second thread costs more

// Returns how many of `threads` are worth starting for some operations.
inline int64_t useful(int32_t threads, int64_t operations) {
  return std::max<int64_t>(1, std::min<int64_t>(threads, operations / kWorthwhile));
}

// Where all threads of a team wait for one another. Who waits long sleeps, so that the one that is waited
// for gets the core where others keep its own busy.
class Barrier {
 public:
  void wait(int32_t size) {
    if (size == 1) return;
    const int32_t phase = phase_.load();
    if (arrived_.fetch_add(1) == size - 1) {
      arrived_.store(0);
      phase_.store(phase + 1);
      if (sleepers_.load()) wake();
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins >= kSpins) sleep(phase);
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  static constexpr int kSpins = 2048;

#if defined(__linux__)
  void sleep(int32_t phase) {
    ++sleepers_;  // whoever ends the phase afterwards sees it; before, the call returns at once
    syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
    --sleepers_;
  }
  void wake() { syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void sleep(int32_t) {}
  void wake() {}
#endif

  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> phase_{0};
  std::atomic<int32_t> sleepers_{0};
};

// One of the threads that run the same function side by side.
struct Team {
  Barrier* barrier;
  int32_t rank, size;

  void wait() const { barrier->wait(size); }

  // This thread's part of [0, count), contiguous, a multiple of `unit` but for the end.
  std::pair<int64_t, int64_t> part(int64_t count, int64_t unit = 1) const {
    const int64_t units = (count + unit - 1) / unit;
    return {std::min(count, units * rank / size * unit),
            std::min(count, units * (rank + 1) / size * unit)};
  }
};

// Call run(Team) on up to `threads` threads at once; returns when all have.
template <typename Run>
void together(int64_t threads, const Run& run) {
  struct Shared {
    const Run* run;
    Barrier barrier;
  } shared{&run, {}};
#if defined(__linux__)
  if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
    auto body = [](void* data) {  // the runtime may give fewer threads than asked for
      auto& all = *static_cast<Shared*>(data);
      (*all.run)(Team{&all.barrier, omp_get_thread_num(), omp_get_num_threads()});
    };
    GOMP_parallel(body, &shared, static_cast<unsigned>(threads), 0);
    return;
  }
#endif
  run(Team{&shared.barrier, 0, 1});
}

// Split [0, count) into at most `threads` contiguous parts of similar size and run them all.
// work: operations per item; too little work stays on the calling thread.
template <typename Run>
void parallel(int32_t threads, int64_t count, int64_t work, const Run& run) {
  together(std::min(useful(threads, count * work), std::max<int64_t>(1, count)), [&](const Team& team) {
    const auto [begin, end] = team.part(count);
    if (begin < end) run(begin, end);
  });
}

}  // namespace calr
