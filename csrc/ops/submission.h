// Submitting to a mover: in a scope of it this thread's ops check and lower, and their jobs are kept for later.
#pragma once

#include "ops/job.h"

namespace kvkernels {

// False while explain() looks, which moves nothing either.
bool submitting();

// Takes a job that was checked. Throws where the mover cannot carry it out.
void submit_job(Job job);

}  // namespace kvkernels
