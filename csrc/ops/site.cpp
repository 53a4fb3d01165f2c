#include "ops/site.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "core/cuda_driver.h"
#include "core/text.h"
#include "ops/executors/room.h"

namespace kvkernels {

Choice Site::choose(const Job& job) {
  if (is_host()) {
    return {Executor::kCpu, job.has_addresses ? "no address is a cuda device's" : "both sides are in host memory"};
  }
  const std::string refusal = room_of(Executor::kTriton).refusal(job, *this);
  if (refusal.empty()) return {Executor::kTriton, why_no_cuda_};
  throw std::runtime_error(text("tensors on a cuda device need CUDA code or the triton kernels: ", why_no_cuda_,
                                ", and executor 'triton' cannot serve this call: ", refusal));
}

std::unique_ptr<Site> site_without_cuda(const Job& job, std::string why_no_cuda) {
  if (job.peer >= 0) {
    value_error(job.op, ": tensors must be on one cuda device, got cuda:", job.device, " and cuda:", job.peer, ": ",
                why_no_cuda);
  }
  return std::make_unique<Site>(job.device, std::move(why_no_cuda));
}

Issued Site::run(Plan& plan) { return plan.run(); }

std::string Site::unreachable(const Job& job) const {
  const bool writes = job.work.direction == Direction::kDeviceToHost;
  const char* const list = writes ? job.dst_list : job.src_list;
  if (!std::all_of(job.host_tensors.begin(), job.host_tensors.end(), is_pinned)) {
    return text(list, " must be in pinned memory");
  }
  for (const Tensor& tensor : job.host_tensors) {
    const std::string why = host_address_refusal(tensor.const_data_ptr(), writes);
    if (!why.empty()) {
      return text(list, " must be pinned memory that a kernel can use at the host's address, got ", why);
    }
  }
  return "";
}

}  // namespace kvkernels
