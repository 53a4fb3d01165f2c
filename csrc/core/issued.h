// What an executor really issued; its counters add these up, and explain() predicts them.
#pragma once

#include <cstdint>

namespace kvkernels {

struct Issued {
  int64_t launches = 0;     // kernels, or calls of a copy function
  int64_t descriptors = 0;  // what those were told: copies for cpu and dma; table entries (moves and pairs) for kernels
  int64_t bytes = 0;
};

}  // namespace kvkernels
