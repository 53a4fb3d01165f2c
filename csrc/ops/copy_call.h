// What every op on tensors does before an executor is chosen: check, coalesce, lower.
#pragma once

#include <functional>
#include <string>
#include <vector>

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
  std::vector<Run> runs;  // verified
  int64_t src_subblocks = 1;
  int64_t dst_subblocks = 1;
  IdColumn src_ids;
  IdColumn dst_ids;
  int64_t rows = 0;
  IdLimit src_limit;
  IdLimit dst_limit;
  bool ids_on_device = false;
  bool skip_negative = false;
  bool dst_is_list = true;
  bool soon_read = false;  // the destination is a buffer that its caller reads next
  Executor executor = Executor::kAuto;
  int64_t sm_budget = 0;
  std::function<void(const Job&)> reference;  // the same call on the reference; empty where nobody named it
};

void carry_out(CopyCall call);

// A call's ids on the device, with its limits.
DeviceIds device_ids_of(const CopyCall& call);

// The tightest pool of a list, which an id out of range is reported against.
IdLimit limit_of(const char* list, const std::vector<Pool>& pools, int64_t subblocks, bool is_list = true);

Direction direction_of(const Place& src, const Place& dst);

// That a copy on the host may use.
int torch_threads();

}  // namespace kvkernels
