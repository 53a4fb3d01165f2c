// Where a job runs: the host or one device, and what is known of the way there.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "core/issued.h"
#include "ops/job.h"

namespace kvkernels {

class Plan;

// The host, or a device where this library's CUDA code does not serve, whose kernels are Triton's.
class Site {
 public:
  explicit Site(int device = -1, std::string why_no_cuda = "")
      : device_(device), why_no_cuda_(std::move(why_no_cuda)) {}
  virtual ~Site() = default;
  Site(const Site&) = delete;
  Site& operator=(const Site&) = delete;

  bool is_host() const { return device_ < 0; }
  int device() const { return device_; }  // -1 for the host
  const std::string& why_no_cuda() const { return why_no_cuda_; }
  virtual bool has_cuda() const { return false; }  // it is a CudaSite

  // What `auto` takes.
  virtual Choice choose(const Job& job);

  // Why no kernel can reach the job's memory; empty where one can.
  virtual std::string unreachable(const Job& job) const;

  // The work by the addresses that a kernel uses.
  virtual const Work& device_work(const Job& job) { return job.work; }

  // Runs what an executor made for a job here, in the order that the job's streams ask for.
  virtual Issued run(Plan& plan);

  // Runs `body` with the address of the device's fault word, for launches that write it; null where Python keeps it.
  virtual void with_fault_word(const std::function<void(const void* word)>& body) { body(nullptr); }

 private:
  int device_;
  std::string why_no_cuda_;
};

// ValueError for a job of two devices.
std::unique_ptr<Site> site_without_cuda(const Job& job, std::string why_no_cuda);

// In a build with CUDA code in cuda_site.cpp, in one without in cuda_absent.cpp:

// The site of a job on a device, which is set the direction of raw addresses. `only_explains`: nothing will be run.
std::unique_ptr<Site> device_site(Job& job, bool only_explains);

// Whether, since the one, the thread may have put bytes on their way: then an error leaves the destination undefined.
void begin_issuing();
bool may_have_issued();

}  // namespace kvkernels
