// What the executors really issued, counted where it is issued.
#pragma once

#include <cstdint>
#include <string>

#include "core/lower.h"

namespace kvkernels {

void count_issued(Executor executor, int64_t launches, int64_t descriptors, int64_t bytes);

// {"cpu": {"calls": …, "launches": …, "descriptors": …, "bytes": …}, …}
std::string counters_json();
void reset_counters();

}  // namespace kvkernels
