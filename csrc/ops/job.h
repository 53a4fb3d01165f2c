// A call, checked and lowered, as the executors see it: ids on the host, ids on a device and raw addresses alike.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "core/bound.h"
#include "core/lower.h"
#include "ops/stable_abi.h"

namespace kvkernels {

// Moves by the device's addresses, for any ids of their pools.
struct DeviceMoves {
  std::mutex mutex;
  bool is_known = false;
  std::vector<Move> moves;
  std::string unreachable;  // why no kernel can reach them; empty where one can
};

class Held;

// The destinations first: opening one may move a source that is a view of it.
struct HeldSides {
  std::shared_ptr<const Held> dst;
  std::shared_ptr<const Held> src;
};

struct Job {
  const char* op = "";
  const char* src_list = "src";  // what errors call the two sides
  const char* dst_list = "dst";
  Executor asked = Executor::kAuto;
  int64_t sm_budget = 0;
  bool any_source_order = false;
  int device = -1;  // that a side is on; -1 where both are on the host
  int peer = -1;    // the destination's, where the source is on another device, which then is `device`
  Work work;        // for a job on a device lowered as a copy engine takes it; a kernel takes any order

  // The tensors of the host's side; empty for raw addresses.
  std::span<const Tensor> host_tensors;
  // For a mover, which carries the job out later: what the work was lowered from, and its tensors.
  std::shared_ptr<const BoundCopy> bound;
  HeldSides held;
  bool is_for_mover = false;

  // The same call on the reference; empty where nobody named it.
  std::function<void(const Job& job)> reference;

  // Where the work's moves are for the device, as found for a job before with the same memory; filled in by the first.
  std::shared_ptr<DeviceMoves> device_moves;
  DeviceIds any_ids;  // with the pools' limits

  // Raw addresses: the copies as the caller listed them, of which work.fragments has neighbours as one.
  bool has_addresses = false;
  std::vector<Fragment> listed;
  // None, while CUDA is in use: nobody can say where they are.
  bool is_nowhere = false;
};

}  // namespace kvkernels
