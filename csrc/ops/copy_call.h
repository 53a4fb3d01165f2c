// What every op on tensors does before an executor is chosen: check, coalesce, lower.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/bound.h"
#include "core/lower.h"
#include "core/pairs.h"
#include "ops/arguments.h"
#include "ops/job.h"

namespace kvkernels {

struct CopyCall {
  const char* op = "";
  const char* ids_name = "mapping";  // what errors call the mapping, the sources and the destinations
  const char* src_list = "src";
  const char* dst_list = "dst";
  Pools src;
  Pools dst;
  std::vector<Run> runs;                   // verified
  std::shared_ptr<const BoundCopy> bound;  // instead of the pools and the runs, where they were bound before
  int64_t src_subblocks = 1;
  int64_t dst_subblocks = 1;
  std::shared_ptr<DeviceMoves> device_moves;  // as in Job
  HeldSides held;                             // as in Job; empty where nothing was kept before
  IdColumn src_ids;
  IdColumn dst_ids;
  int64_t rows = 0;
  IdLimit src_limit;
  IdLimit dst_limit;
  bool ids_on_device = false;
  bool skip_negative = false;
  bool dst_is_list = true;
  bool recurs = true;      // the same pools come again, so that what is bound is worth keeping
  bool soon_read = false;  // the destination is a buffer that its caller reads next
  Executor executor = Executor::kAuto;
  int64_t sm_budget = 0;
  std::function<void(const Job&)> reference;  // the same call on the reference; empty where nobody named it

  // A mapping of two columns, checked.
  void take_mapping(const char* argument, const Tensor& mapping);
  void take_ids(const Ids& ids);
};

void carry_out(CopyCall call);

// copy_pages' arguments, checked and verified; `mapping` is null where it comes later.
CopyCall checked_copy(const char* op, const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                      const Tensor* mapping, const Tensor& runs, int64_t src_subblocks, int64_t dst_subblocks,
                      const std::string& executor, int64_t sm_budget);

// Binds the pools and the runs of a call, which are verified.
void bind_now(CopyCall& call);

// The call's pools and runs as bound before, or null: then they are to be verified, and carry_out() binds them.
std::shared_ptr<const BoundCopy> bound_before(CopyCall& call);

// A call's ids on the device, with its limits.
DeviceIds device_ids_of(const CopyCall& call);

// The tightest pool of a list, which an id out of range is reported against.
IdLimit limit_of(const char* list, const std::vector<Pool>& pools, int64_t subblocks, bool is_list = true);

Direction direction_of(const Place& src, const Place& dst);

// That a copy on the host may use.
int torch_threads();

}  // namespace kvkernels
