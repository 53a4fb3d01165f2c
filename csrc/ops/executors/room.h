// An executor is a room with three doors: why it cannot serve a job, what it would do, and doing it. A file of this
// folder is one; core/executors.inc lists them.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "core/issued.h"
#include "ops/explain.h"
#include "ops/job.h"
#include "ops/site.h"

namespace kvkernels {

// What an executor does for one job, which it keeps references to.
class Plan {
 public:
  virtual ~Plan() = default;

  // Writes what run() would issue over what holds for any executor.
  virtual void describe(Explanation& explanation) const = 0;

  virtual Issued run() = 0;
};

// Thrown by run() with nothing issued, where another executor may serve the same job.
struct TakeAnother : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Room {
  // Empty where the executor can serve the job.
  std::string (*refusal)(const Job& job, Site& site);

  // For a job that is not refused and moves something. job.work.executor is this one.
  std::unique_ptr<Plan> (*plan)(const Job& job, Site& site);
};

const Room& room_of(Executor executor);

// For those that need this library's CUDA code: why it does not serve where the job is.
std::string cuda_refusal(const Job& job, const Site& site);

#define KVKERNELS_EXECUTOR(constant, name) extern const Room name##_room;
#include "core/executors.inc"
#undef KVKERNELS_EXECUTOR

}  // namespace kvkernels
