#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>

namespace calr {
namespace {

constexpr int64_t kWorthwhile = 32768;  // operations below which waking a thread costs more
constexpr int kSpins = 2000;            // about 20 µs: the gap between two layers of a model

class Pool {
 public:
  explicit Pool(int32_t size) : workers_(size) {
    for (int32_t i = 0; i < size; ++i) {
      workers_[i].thread = std::thread([this, i] { serve(i); });
      workers_[i].thread.detach();
    }
  }

  int32_t size() const { return static_cast<int32_t>(workers_.size()); }

  void run(int32_t parts, int64_t count, const std::function<void(int64_t, int64_t)>& task) {
    std::lock_guard<std::mutex> one_at_a_time(callers_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      parts_ = parts;
      count_ = count;
      left_.store(parts - 1, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    part(0);
    while (left_.load(std::memory_order_acquire) > 0) std::this_thread::yield();
  }

 private:
  struct Worker {
    std::thread thread;
  };

  void part(int32_t index) {
    const int64_t begin = count_ * index / parts_, end = count_ * (index + 1) / parts_;
    if (begin < end) (*task_)(begin, end);
  }

  void serve(int32_t index) {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && round_.load(std::memory_order_acquire) == seen; ++i) pause();
      int32_t parts;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
        seen = round_.load(std::memory_order_relaxed);
        parts = parts_;
      }
      if (index + 1 < parts) {
        part(index + 1);
        left_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  std::vector<Worker> workers_;
  std::mutex callers_, mutex_;
  std::condition_variable wake_;
  const std::function<void(int64_t, int64_t)>* task_ = nullptr;
  int32_t parts_ = 0;
  int64_t count_ = 0;
  std::atomic<int32_t> left_{0};
  std::atomic<uint64_t> round_{0};
};

// Leaked on purpose: workers sleep until the process ends. A forked child starts its own.
Pool& pool(int32_t size) {
  static std::mutex mutex;
  static Pool* current = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (current == nullptr || owner != getpid() || current->size() < size) {
    current = new Pool(size);
    owner = getpid();
  }
  return *current;
}

}  // namespace

void parallel(int32_t threads, int64_t count, int64_t work,
              const std::function<void(int64_t, int64_t)>& run) {
  const int64_t useful = std::max<int64_t>(1, count * work / kWorthwhile);
  const int32_t parts =
      static_cast<int32_t>(std::min<int64_t>({std::max(threads, 1), useful, std::max<int64_t>(count, 1)}));
  if (parts <= 1) {
    run(0, count);
    return;
  }
  pool(parts - 1).run(parts, count, run);
}

}  // namespace calr
