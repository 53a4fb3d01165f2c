#include "ops/path.h"

#include <memory>

#include "core/batch.h"
#include "ops/counters.h"
#include "ops/executors/room.h"
#include "ops/explain.h"
#include "ops/named_errors.h"
#include "ops/policy_ops.h"
#include "ops/submission.h"

namespace kvkernels {
namespace {

[[noreturn]] void refuse(const Job& job, Executor executor, const std::string& reason) {
  value_error(job.op, ": executor '", name_of(executor), "' cannot serve this call: ", reason);
}

// Choose, then explain or run.
void serve(Job& job, Site& site, bool only_explains) {
  const Choice choice = job.asked == Executor::kAuto ? site.choose(job) : Choice{job.asked, "named by the caller"};
  const Room& room = room_of(choice.executor);
  const std::string refusal = room.refusal(job, site);
  if (!refusal.empty()) refuse(job, choice.executor, refusal);
  job.work.executor = choice.executor;
  if (job.sm_budget == 0) job.sm_budget = choice.sm_budget;
  std::unique_ptr<Plan> plan;
  if (job.work.bytes > 0) plan = room.plan(job, site);
  if (only_explains) {
    Explanation explanation = explanation_of(job.op, job.work, choice.reason);
    explanation.table = table_of(choice.executor);
    if (plan) plan->describe(explanation);
    return record(explanation);
  }
  if (plan) count_issued(choice.executor, site.run(*plan));
}

void serve_on_device(Job& job, bool only_explains) {
  const std::unique_ptr<Site> site = device_site(job, only_explains);
  try {
    serve(job, *site, only_explains);
  } catch (const TakeAnother&) {
    serve(job, *site, only_explains);
  }
}

// An error after bytes may be on their way says that the destination is undefined.
template <class Body>
void issuing_errors(const char* op, Body&& body) {
  begin_issuing();
  named_errors(op, [&] {
    try {
      body();
    } catch (const std::runtime_error& error) {
      if (!may_have_issued()) throw;
      throw std::runtime_error(text(error.what(), "; the destination is undefined"));
    }
  });
}

}  // namespace

bool carry_out(Job job) {
  if (submitting()) {
    submit_job(std::move(job));
    return true;
  }
  const bool only_explains = explaining();
  if (job.device < 0 || job.asked == Executor::kReference) {
    Site host;
    serve(job, host, only_explains);
  } else {
    issuing_errors(job.op, [&] { serve_on_device(job, only_explains); });
  }
  recycle(std::move(job.work.segments));
  recycle(std::move(job.work.fragments));
  return !only_explains;
}

}  // namespace kvkernels
