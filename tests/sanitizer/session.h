// What all cases share: the device, a stream, how calls are made of csrc/cuda, and the account of what was seen.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/lower.h"
#include "cuda/device.h"
#include "cuda/fault.h"
#include "cuda/kernel.h"
#include "trial.h"

namespace kvkernels::sanitizer {

class Session {
 public:
  explicit Session(Plant plant);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  cudaStream_t stream() const { return stream_; }
  const DeviceLimits& limits() const { return limits_; }
  Plant plant() const { return plant_; }
  uint32_t next_seed() { return ++seed_; }

  // Why the executor bulk serves no call here; empty where it does.
  std::string bulk_refusal() const;

  // Plans and launches the executors kernel and bulk, as the ops do: with the host's side at the device's addresses, or
  // with addresses that are the device's already.
  KernelPlan launch(Work work, int sm_budget);
  KernelPlan launch_mapped(const Work& work, int sm_budget);

  // Copies to device memory that lives until finish().
  Upload upload();

  // Waits for the stream, and gives back what was uploaded.
  void finish();

  // Compares both sides, and what the kernels recorded of bad ids with what they should have.
  void judge(const std::string& name, const Trial& trial, const std::vector<Pair>& pairs,
             const std::optional<FaultRecord>& fault);

  int64_t cases() const { return cases_; }
  int64_t wrong_cases() const { return wrong_cases_; }
  int64_t wrong_bytes() const { return wrong_bytes_; }

 private:
  const Plant plant_;
  cudaStream_t stream_ = nullptr;
  DeviceLimits limits_;
  std::vector<Buffer> uploads_;
  uint32_t seed_ = 0;
  int64_t cases_ = 0;
  int64_t wrong_cases_ = 0;
  int64_t wrong_bytes_ = 0;
};

struct Group {
  const char* name;
  bool needs_bulk;
  std::function<void(Session&)> run;
};

// In the order in which they run.
const std::vector<Group>& groups();

// Reads one page past the end of a pool on the device: what a sanitizer must report.
void read_out_of_bounds(Session& session);

}  // namespace kvkernels::sanitizer
