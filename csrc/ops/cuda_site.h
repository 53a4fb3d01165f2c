// A job's CUDA device, and what executors ask about the way to it; each answer is found once.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/gpu_policy.h"
#include "core/staged.h"
#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/peer.h"
#include "cuda/stream.h"
#include "ops/address_facts.h"
#include "ops/site.h"

namespace kvkernels {

// The device is current for as long.
class CudaSite : public Site {
 public:
  // Sets the direction of a job of raw addresses. ValueError for a destination that the device must not write.
  CudaSite(Job& job, bool only_explains);

  bool has_cuda() const override { return true; }
  Choice choose(const Job& job) override;
  Issued run(Plan& plan) override;
  std::string unreachable(const Job&) const override { return unreachable_; }
  const Work& device_work(const Job& job) override { return mapped(job).front(); }
  void with_fault_word(const std::function<void(const void* word)>& body) override;

  cudaStream_t stream() const { return stream_; }
  const DeviceLimits& limits() const { return limits_; }
  bool is_capturing() const { return is_capturing_; }
  bool allows_batches() const;
  BulkFacts bulk() const;

  // Why none of the library's own kernels runs here; empty where they do.
  std::string no_code() const;

  // The work as a kernel takes it, by the device's addresses; of raw addresses one for each size.
  std::vector<Work>& mapped(const Job& job);

  // How the job would go by way of a ring.
  const Staging& staging(const Job& job);

  // Whether `auto` may count on a ring: not for a while after there was no memory for one.
  bool may_have_ring();
  void note_no_ring();

  // What explain() says of any job here: members of a JSON object.
  std::string json() const;

 private:
  void map_tensors(const Job& job);
  std::string map_work(const Job& job, Work& work) const;
  void look_at_addresses(Job& job);
  void meet_peer(const Job& job);

  const bool only_explains_;
  DeviceGuard guard_;
  cudaStream_t stream_;
  DeviceLimits limits_;
  bool is_capturing_;
  bool is_legacy_;
  std::optional<DeviceStream> peer_;
  std::string unreachable_;
  std::vector<Work> mapped_;
  std::optional<bool> may_have_ring_;
  std::optional<Staging> staging_;
};

// Device memory for tables. Freed after the launches: the allocator hands it out again on this stream only, behind the
// kernels.
class Uploads {
 public:
  explicit Uploads(int device) : device_(device) {}
  Upload function();

 private:
  int device_;
  std::vector<Tensor> tensors_;
};

// Of a site that has_cuda().
inline CudaSite& cuda_of(Site& site) { return static_cast<CudaSite&>(site); }

int grid_budget(int64_t sm_budget);

}  // namespace kvkernels
