// Verifies a plan before it is used: every run inside its pages, every destination byte written once.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "core/plan.h"

namespace kvkernels {

// What a plan is verified against. Strides and addresses do not matter here: all offsets are inside a page.
struct PageSizes {
  std::vector<int64_t> src;
  std::vector<int64_t> dst;
  int64_t src_subblocks = 1;
  int64_t dst_subblocks = 1;
};

// A plan too long to be compared fragment by fragment, and not regular enough to be told without.
struct NotComparable : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// ValueError naming the run. A plan that passed is remembered by its content; safe to call from many threads.
void verify_runs(const char* op, const Run* runs, int64_t count, const PageSizes& pages);

}  // namespace kvkernels
