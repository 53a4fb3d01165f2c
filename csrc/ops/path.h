// The one way of every call: an op checks and lowers, and here an executor is chosen, and explained or run.
#pragma once

#include "ops/job.h"

namespace kvkernels {

// Raises where the executor that the caller named cannot serve the job. False where it was only explained.
bool carry_out(Job job);

}  // namespace kvkernels
