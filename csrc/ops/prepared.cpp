// Copies that are prepared once and run for one mapping after the other: pools, runs and what follows from them are
// kept, and a run checks its mapping, that the pools are where they were, and nothing else.
#include <atomic>
#include <memory>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ops/copy_call.h"
#include "ops/held.h"
#include "ops/ops.h"

namespace kvkernels {
namespace {

constexpr const char* kOp = "PreparedCopy.run";

constexpr const char* kSince =
    "the copy was prepared, got a storage that was resized, freed or moved since; bind the pools again";

class PreparedCopy {
 public:
  PreparedCopy(const std::vector<Tensor>& src, const std::vector<Tensor>& dst, Tensor runs, CopyCall call)
      : dst_(std::make_shared<Held>(kOp, "dst", true, true, dst, kSince)),
        src_(std::make_shared<Held>(kOp, "src", true, false, src, kSince)),
        runs_(std::move(runs)),
        call_(std::move(call)) {
    call_.op = kOp;
    call_.src.tensors = src_->tensors();
    call_.dst.tensors = dst_->tensors();
    call_.held = {dst_, src_};
  }

  void run(const Tensor& mapping) {
    // The destinations first: opening one may move a source that is a view of it.
    dst_->check();
    src_->check();
    CopyCall call = call_;
    call.take_mapping("mapping", mapping);
    call.device_moves = call.ids_on_device ? moves_for_device_ids_ : moves_for_host_ids_;
    if (call.executor == Executor::kReference) {
      if (call.ids_on_device) {
        value_error(kOp, ": executor 'reference' cannot serve this call: its ids must be on the cpu");
      }
      call.reference = [this, &mapping](const Job&) {
        call_reference(src_->tensors(), dst_->tensors(), mapping, runs_, call_.src_subblocks, call_.dst_subblocks,
                       call_.skip_negative);
      };
    }
    carry_out(std::move(call));
  }

 private:
  const std::shared_ptr<const Held> dst_;
  const std::shared_ptr<const Held> src_;
  const Tensor runs_;
  CopyCall call_;  // all of it but the ids
  // Apart, because with ids on the device any memory will do that a kernel can reach.
  const std::shared_ptr<DeviceMoves> moves_for_host_ids_ = std::make_shared<DeviceMoves>();
  const std::shared_ptr<DeviceMoves> moves_for_device_ids_ = std::make_shared<DeviceMoves>();
};

// By handle. Whoever runs one keeps it, whatever is released meanwhile.
class Registry {
 public:
  int64_t add(std::shared_ptr<PreparedCopy> copy) {
    const std::unique_lock lock(mutex_);
    copies_.emplace(++last_, std::move(copy));
    return last_;
  }

  std::shared_ptr<PreparedCopy> find(int64_t handle) {
    const std::shared_lock lock(mutex_);
    const auto found = copies_.find(handle);
    if (found == copies_.end()) value_error(kOp, ": the copy must be prepared, got a released handle");
    return found->second;
  }

  void remove(int64_t handle) {
    std::shared_ptr<PreparedCopy> last;  // freed without the lock: its tensors may run anything
    const std::unique_lock lock(mutex_);
    const auto found = copies_.find(handle);
    if (found == copies_.end()) return;
    last = std::move(found->second);
    copies_.erase(found);
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<PreparedCopy>> copies_;
  int64_t last_ = 0;
};

Registry& registry() {
  // Never destroyed: other threads may still be in an op when the process's statics go.
  static Registry& registry = *new Registry;
  return registry;
}

}  // namespace

int64_t prepare(const std::vector<Tensor>& src, const std::vector<Tensor>& dst, const Tensor& runs,
                int64_t src_subblocks_per_block, int64_t dst_subblocks_per_block, bool skip_negative,
                StrArgument executor, int64_t sm_budget) {
  CopyCall call = checked_copy("prepare", src, dst, nullptr, runs, src_subblocks_per_block, dst_subblocks_per_block,
                               executor.take(), sm_budget);
  call.skip_negative = skip_negative;
  bind_now(call);
  return registry().add(std::make_shared<PreparedCopy>(src, dst, runs, std::move(call)));
}

void run_prepared(int64_t prepared, const Tensor& mapping) { registry().find(prepared)->run(mapping); }

void release_prepared(int64_t prepared) { registry().remove(prepared); }

}  // namespace kvkernels
