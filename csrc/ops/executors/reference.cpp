// The pure-torch reference, which has no lowering of its own: it is counted by what it was asked for.
#include "ops/executors/room.h"

namespace kvkernels {
namespace {

class ReferencePlan : public Plan {
 public:
  explicit ReferencePlan(const Job& job) : job_(job) {
    issued_.bytes = job.work.bytes;
    issued_.descriptors = static_cast<int64_t>(job.listed.size());
    for (const Move& move : job.work.moves) issued_.descriptors += job.work.pairs * move.fragments_per_pair();
  }

  void describe(Explanation& explanation) const override {
    explanation.shape = "reference";
    explanation.descriptors = issued_.descriptors;
    explanation.lanes = 1;
    explanation.streaming = false;
  }

  Issued run() override {
    job_.reference(job_);
    return issued_;
  }

 private:
  const Job& job_;
  Issued issued_;
};

// The path has it on the host, whatever tensors are on; the addresses of a device mean nothing there.
std::string refusal(const Job& job, Site&) {
  return job.has_addresses && job.device >= 0 ? "it takes tensors, and got addresses" : "";
}

std::unique_ptr<Plan> plan(const Job& job, Site&) { return std::make_unique<ReferencePlan>(job); }

}  // namespace

const Room reference_room{refusal, plan};

}  // namespace kvkernels
