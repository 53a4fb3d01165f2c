// C++ checks, lowers and writes the table; Python launches the kernels.
#include <cstring>

#include "ops/executors/room.h"
#include "ops/triton_table.h"

namespace kvkernels {
namespace {

class TritonPlan : public Plan {
 public:
  TritonPlan(const Job& job, Site& site) : work_(site.device_work(job)), site_(site) {
    head_.sm_budget = job.sm_budget;
    head_.device = site.device();
    table_ = triton_table(work_, head_);
  }

  void describe(Explanation& explanation) const override {
    const Issued planned = issued();
    explanation.launches = planned.launches;
    explanation.descriptors = planned.descriptors;
    explanation.device =
        text("{\"index\": ", head_.device, head_.is_chunked ? ", \"chunks\": " : ", \"tiles\": ", head_.pieces,
             ", \"width\": ", head_.width, ", \"table_bytes\": ", table_.size() * sizeof(int64_t), '}');
  }

  // Ids on the device may be bad, and the word for that lies there.
  Issued run() override {
    if (work_.device_ids) {
      site_.with_fault_word([this](const void* word) { launch(word); });
    } else {
      launch(nullptr);
    }
    return issued();
  }

 private:
  Issued issued() const { return {1, head_.moves + work_.pairs, work_.bytes}; }

  void launch(const void* fault_word) {
    constexpr size_t kColumns = sizeof(TritonHead) / sizeof(int64_t);
    head_.fault = static_cast<int64_t>(reinterpret_cast<uintptr_t>(fault_word));
    std::memcpy(table_.data(), &head_, sizeof head_);
    call_triton_copy(upload(), {table_.begin(), table_.begin() + kColumns});
  }

  Tensor upload() const {
    if (site_.is_host()) return int64_tensor({static_cast<int64_t>(table_.size())}, table_.data());
    return upload_bytes(table_.data(), table_.size() * sizeof(int64_t), site_.device());
  }

  const Work& work_;
  Site& site_;
  TritonHead head_;
  std::vector<int64_t> table_;
};

std::string refusal(const Job& job, Site& site) {
  if (job.is_for_mover) return "a mover's threads never run Python";
  if (job.has_addresses) return "it takes tensors, and got addresses";
  if (job.peer >= 0) return "its tensors are on two devices";
  const std::string reason = call_triton_refusal(site.device());
  return !reason.empty() || site.is_host() ? reason : site.unreachable(job);
}

std::unique_ptr<Plan> plan(const Job& job, Site& site) { return std::make_unique<TritonPlan>(job, site); }

}  // namespace

const Room triton_room{refusal, plan};

}  // namespace kvkernels
