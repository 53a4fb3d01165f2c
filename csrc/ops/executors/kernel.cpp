#include "ops/executors/kernel.h"

#include <algorithm>
#include <vector>

#include "ops/cuda_site.h"

namespace kvkernels {
namespace {

// A move's pairs are those of its launch, so each size of raw addresses has launches of its own.
class KernelsPlan : public Plan {
 public:
  KernelsPlan(const Job& job, CudaSite& site) : site_(site), works_(site.mapped(job)), has_sizes_(job.has_addresses) {
    for (Work& work : works_) {
      work.executor = job.work.executor;
      plans_.push_back(plan_kernel(work, grid_budget(job.sm_budget), site.limits(), site.is_capturing()));
    }
  }

  void describe(Explanation& explanation) const override {
    KernelPlan sum = plans_.front();
    for (size_t i = 1; i < plans_.size(); ++i) add(plans_[i], sum);
    if (has_sizes_) describe_sizes(explanation);
    explanation.launches = sum.launches;
    explanation.descriptors = sum.descriptors;
    explanation.device =
        text('{', site_.json(), ", \"cut\": ", sum.cut, ", \"ctas\": ", sum.ctas, ", \"threads\": ", sum.threads,
             ", \"shared_bytes\": ", sum.shared_bytes, ", \"tiles\": ", sum.tiles,
             ", \"table_bytes\": ", sum.table_bytes, ", \"uploads\": ", sum.uploads ? "true" : "false", '}');
  }

  Issued run() override {
    Uploads uploads(site_.device());
    Issued issued;
    for (const KernelPlan& plan : plans_) {
      const Issued more = run_kernel(plan, uploads.function(), site_.stream());
      issued.launches += more.launches;
      issued.descriptors += more.descriptors;
      issued.bytes += more.bytes;
    }
    return issued;
  }

 private:
  static void add(const KernelPlan& plan, KernelPlan& sum) {
    sum.launches += plan.launches;
    sum.ctas = std::max(sum.ctas, plan.ctas);
    sum.threads = std::max(sum.threads, plan.threads);
    sum.shared_bytes = std::max(sum.shared_bytes, plan.shared_bytes);
    sum.tiles += plan.tiles;
    sum.descriptors += plan.descriptors;
    sum.table_bytes += plan.table_bytes;
    sum.uploads = sum.uploads || plan.uploads;
    if (plan.cut != sum.cut) sum.cut = "null";  // more than one
  }

  // A size is a move.
  void describe_sizes(Explanation& explanation) const {
    explanation.moves = static_cast<int64_t>(works_.size());
    explanation.pairs = 0;
    for (const Work& work : works_) {
      explanation.pairs += work.pairs;
      if (work.shape != works_.front().shape) explanation.shape = name_of(Shape::kPage);
    }
  }

  CudaSite& site_;
  std::vector<Work>& works_;
  const bool has_sizes_;
  std::vector<KernelPlan> plans_;
};

}  // namespace

std::string kernel_refusal(const Job& job, Site& site) {
  if (!site.has_cuda()) return cuda_refusal(job, site);
  const std::string no_code = cuda_of(site).no_code();
  return no_code.empty() ? site.unreachable(job) : no_code;
}

std::unique_ptr<Plan> kernel_plan(const Job& job, Site& site) {
  return std::make_unique<KernelsPlan>(job, cuda_of(site));
}

const Room kernel_room{kernel_refusal, kernel_plan};

}  // namespace kvkernels
