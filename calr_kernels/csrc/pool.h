// A small thread pool: workers spin briefly for the next task, then sleep.
#pragma once

#include <cstdint>
#include <functional>

namespace calr {

// Split [0, count) into at most `threads` contiguous parts of similar size and run them, the first
// on the calling thread. work: operations per item; too little work stays on the calling thread.
void parallel(int32_t threads, int64_t count, int64_t work,
              const std::function<void(int64_t, int64_t)>& run);

}  // namespace calr
