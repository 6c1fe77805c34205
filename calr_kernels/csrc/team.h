// Threads: those of the OpenMP runtime that torch has loaded, so that no second pool competes for
// the same cores (idle workers of both would spin against each other). The library is not linked to
// an OpenMP runtime; without one in the process everything runs on one thread.
//
// Not to be used in a child of fork() whose parent has used it: OpenMP's own threads are gone there.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
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

inline int64_t now() {  // nanoseconds
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

inline int64_t ticks() {  // of some clock that costs next to nothing to look at
#if defined(__x86_64__)
  return static_cast<int64_t>(__builtin_ia32_rdtsc());
#else
  return now();
#endif
}

// How many threads are left out because others keep the cores busy. A thread that has lost its core gets it
// back milliseconds later, all others wait for it, and that at every step: with one thread less the system
// has a core for each. Now and then one more is tried, ever more seldom if it is no use. Pages that have to be
// read from a disk look the same, and pass.
class Oversubscription {
 public:
  // Returns how many of `threads` to use.
  static int64_t allowed(int64_t threads) {
    int64_t fewer = fewer_.load();
    if (threads < 2 || !fewer) return threads;
    const int64_t time = now(), rest = rest_.load();
    int64_t until = until_.load();
    if (time >= until && until_.compare_exchange_strong(until, time + rest)) {
      fewer = std::max<int64_t>(0, std::min(fewer, threads) - 1 - (time - until) / rest);
      fewer_.store(fewer), tried_.store(time);
    }
    return std::max<int64_t>(1, threads - fewer);
  }

  // Counts a wait for a thread without a core; returns whether waits are a large part of the time.
  static bool lost(int64_t waited) {
    const int64_t time = now();
    if (time - since_.load() > kWindow) since_.store(time - waited), lost_.store(0);
    return lost_.fetch_add(waited) + waited > kWindow / 3;
  }

  static void leave_one_out() {
    const int64_t time = now(), before = rest_.load();
    const bool again = time - tried_.load() < before;
    rest_.store(again ? std::min(2 * before, kMostRest) : kLeastRest);
    until_.store(time + rest_.load());
    since_.store(0);
    ++fewer_;
  }

 private:
  static constexpr int64_t kWindow = 40000000, kLeastRest = 100000000, kMostRest = 2000000000;  // nanoseconds
  static inline std::atomic<int64_t> fewer_{0}, since_{0}, lost_{0}, until_{0}, tried_{0}, rest_{kLeastRest};
};

// Returns how many of `threads` are worth starting for some operations.
inline int64_t useful(int32_t threads, int64_t operations) {
  return std::max<int64_t>(1, std::min<int64_t>(Oversubscription::allowed(threads), operations / kWorthwhile));
}

// Where all threads of a team wait for one another. Who waits spins: to sleep costs a busy core's next turn.
// After waits far longer than the work before them, the team goes on with one thread less.
class Barrier {
 public:
  void start(int32_t size) { size_.store(size); }
  int32_t size() const { return size_.load(std::memory_order_relaxed); }

  void wait() {
    const int32_t size = size_.load(), phase = phase_.load();
    if (size == 1) return;
    const int32_t before = arrived_.fetch_add(1);
    if (before == size - 1) {
      arrived_.store(0);
      if (oversubscribed_.load(std::memory_order_relaxed)) {
        oversubscribed_.store(false);
        Oversubscription::leave_one_out();
        size_.store(size - 1);
      }
      released_.store(ticks(), std::memory_order_relaxed);
      phase_.store(phase + 1);
      if (sleepers_.load()) wake();
      return;
    }
    const int64_t tick = ticks(), worked = tick - released_.load(std::memory_order_relaxed);
    int64_t began = 0;
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins < kSpins) continue;
      spins = 0;
      const int64_t time = now();
      if (!began) began = time;
      if (time - began > kSleepless) sleep(phase);
    }
    if (!began || before || size_.load() < size) return;  // short, others waited longer, or it is done
    const int64_t waited = now() - began;
    if (waited > kPatience && ticks() - tick > 2 * worked && Oversubscription::lost(waited)) oversubscribed_.store(true);
  }

 private:
  static constexpr int kSpins = 512;                                   // between two looks at the clock
  static constexpr int64_t kPatience = 1000000, kSleepless = 20000000;  // nanoseconds

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
  alignas(64) std::atomic<int32_t> size_{1}, sleepers_{0};
  std::atomic<bool> oversubscribed_{false};
  std::atomic<int64_t> released_{ticks()};
};

struct LeftOut {};  // thrown where a thread's team goes on without it

// One of the threads that run the same function side by side. At a `wait` the team may lose its last one.
struct Team {
  Barrier* barrier;
  int32_t rank;

  void wait() const {
    barrier->wait();
    if (rank >= barrier->size()) throw LeftOut{};
  }

  // This thread's part of [0, count), contiguous, a multiple of `unit` but for the end: until the next wait.
  std::pair<int64_t, int64_t> part(int64_t count, int64_t unit = 1) const {
    const int64_t units = (count + unit - 1) / unit, size = barrier->size();
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
      all.barrier.start(omp_get_num_threads());
      try {
        (*all.run)(Team{&all.barrier, omp_get_thread_num()});
      } catch (const LeftOut&) {
      }
    };
    GOMP_parallel(body, &shared, static_cast<unsigned>(threads), 0);
    return;
  }
#endif
  run(Team{&shared.barrier, 0});
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
