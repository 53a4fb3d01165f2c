// What the executors really issued, counted where it is issued.
#pragma once

#include <string>

#include "core/executor.h"
#include "core/issued.h"

namespace kvkernels {

void count_issued(Executor executor, const Issued& issued);

// {"cpu": {"calls": …, "launches": …, "descriptors": …, "bytes": …}, …}
std::string counters_json();
void reset_counters();

}  // namespace kvkernels
