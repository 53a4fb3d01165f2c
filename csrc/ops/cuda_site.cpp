#include "ops/cuda_site.h"

#include <algorithm>
#include <mutex>
#include <set>
#include <utility>

#include "core/cuda_driver.h"
#include "cuda/bulk_kernel.h"
#include "cuda/error.h"
#include "cuda/fault.h"
#include "cuda/pointers.h"
#include "cuda/staging_ring.h"
#include "ops/cuda_state.h"
#include "ops/executors/room.h"

namespace kvkernels {
namespace {

// Pairs of devices of which the first was given access to the second's memory.
std::mutex met_mutex;
std::set<std::pair<int, int>> met;

bool have_met(int device, int peer) {
  const std::lock_guard<std::mutex> lock(met_mutex);
  return met.count({device, peer}) != 0;
}

void note_met(int device, int peer) {
  const std::lock_guard<std::mutex> lock(met_mutex);
  met.insert({device, peer});
}

}  // namespace

CudaSite::CudaSite(Job& job, bool only_explains)
    : Site(job.device),
      only_explains_(only_explains),
      guard_(job.device),
      stream_(static_cast<cudaStream_t>(current_stream(job.device))),
      limits_(device_limits(job.device)),
      is_capturing_(kvkernels::is_capturing(stream_)),
      is_legacy_(kvkernels::is_legacy(stream_)) {
  if (job.has_addresses) {
    look_at_addresses(job);
  } else if (job.work.bytes > 0) {
    map_tensors(job);
  }
  if (job.peer >= 0) meet_peer(job);
}

bool CudaSite::allows_batches() const {
  return !is_capturing_ && !is_legacy_ && driver_function("cuMemcpyBatchAsync", 12080) != nullptr;
}

BulkFacts CudaSite::bulk() const {
  return {limits_.capability, limits_.code_capability, limits_.shared_bytes, kBulkSharedBytes};
}

std::string CudaSite::no_code() const {
  if (limits_.code_capability > 0) return "";
  return text("the library has no code for compute capability ", limits_.capability / 10, '.', limits_.capability % 10);
}

// The job's moves for the device, of prepared copies found once, for any ids.
void CudaSite::map_tensors(const Job& job) {
  Work& work = mapped_.emplace_back(job.work);
  if (job.device_moves == nullptr) {
    unreachable_ = map_work(job, work);
    return;
  }
  DeviceMoves& found = *job.device_moves;
  const std::lock_guard lock(found.mutex);
  if (!found.is_known) {
    Work any_ids = lower_device_ids(job.work.moves, job.any_ids, job.work.direction);
    found.unreachable = map_work(job, any_ids);
    found.moves = std::move(any_ids.moves);
    found.is_known = true;
  }
  unreachable_ = found.unreachable;
  work.moves = found.moves;
}

// Memory that would move is for who names the kernel, or has no other choice.
std::string CudaSite::map_work(const Job& job, Work& work) const {
  PointerMap pointers;
  if (writes_read_only(work, pointers)) {
    value_error(job.op, ": ", job.dst_list,
                " must be writable for the device, got host memory that is registered as read-only");
  }
  const bool may_migrate = job.asked != Executor::kAuto || job.work.device_ids;
  try {
    map_for_device(work, limits_, pointers, {job.src_list, job.dst_list}, may_migrate);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void CudaSite::meet_peer(const Job& job) {
  const DeviceGuard guard(job.peer);
  peer_ = {job.peer, static_cast<cudaStream_t>(current_stream(job.peer))};
  if (kvkernels::is_capturing(peer_->stream) != is_capturing_) {
    throw std::runtime_error(text("the current streams of cuda:", device(), " and cuda:", job.peer,
                                  " must both be captured or neither, got one that is"));
  }
  if (have_met(device(), job.peer)) return;
  if (is_capturing_ && !only_explains_) {
    throw std::runtime_error(text("cuda:", device(), " and cuda:", job.peer,
                                  " must have met in a call before one that is captured, got their first"));
  }
  const std::string refusal = call_peer_refusal(device(), job.peer, !only_explains_);
  if (!refusal.empty()) {
    value_error(job.op, ": tensors must be on one cuda device, or on two of which the source's can access the other, ",
                "got cuda:", device(), " and cuda:", job.peer, ": ", refusal);
  }
  if (!only_explains_) note_met(device(), job.peer);
}

Issued CudaSite::run(Plan& plan) {
  if (!peer_) return plan.run();
  PeerOrder order({device(), stream_}, *peer_);
  const Issued issued = plan.run();
  order.finish();
  return issued;
}

void CudaSite::look_at_addresses(Job& job) {
  const AddressFacts facts = facts_of_addresses(job.op, job.listed);
  if (facts.dst_is_read_only) {
    value_error(job.op, ": dst_ptrs must be writable for the device, got host memory that is registered as read-only");
  }
  job.work.direction = facts.direction();
  job.peer = facts.peer();
  unreachable_ = facts.unreachable;
  const bool migrates = job.asked == Executor::kAuto && !limits_.uses_host_page_tables;
  if (unreachable_.empty() && facts.pageable != nullptr && !limits_.reads_pageable) {
    unreachable_ = text(facts.pageable, " is in pageable host memory, which the device cannot read");
  } else if (unreachable_.empty() && facts.pageable != nullptr && migrates) {
    unreachable_ = text(facts.pageable,
                        " is in pageable host memory, of which each page that a kernel touches moves to the device");
  }
  const int sizes = std::min(count_sizes(job.work.fragments), count_sizes(job.listed));
  if (unreachable_.empty() && sizes > kMostSizes) {
    unreachable_ = text("its fragments have more than ", kMostSizes, " sizes");
  }
}

std::vector<Work>& CudaSite::mapped(const Job& job) {
  if (mapped_.empty() && job.has_addresses) {
    // Neighbours that became one are of many sizes where random pages are of one.
    const bool takes_listed = count_sizes(job.listed) < count_sizes(job.work.fragments);
    mapped_ = addresses_as_ids(takes_listed ? job.listed : job.work.fragments, job.work.direction);
  }
  return mapped_;
}

const Staging& CudaSite::staging(const Job& job) {
  if (!staging_ && is_capturing_) {
    staging_.emplace().refusal =
        "its stream is captured, and its ring on the device serves other calls before a replay";
  } else if (!staging_) {
    staging_ = plan_staging(job.work);
  }
  return *staging_;
}

bool CudaSite::may_have_ring() {
  if (!may_have_ring_) may_have_ring_ = ring_may_be_had(device(), !only_explains_);
  return *may_have_ring_;
}

void CudaSite::note_no_ring() { may_have_ring_ = false; }

std::string CudaSite::json() const {
  return text("\"index\": ", device(), ", \"capturing\": ", is_capturing_ ? "true" : "false",
              ", \"legacy_stream\": ", is_legacy_ ? "true" : "false", peer_ ? text(", \"peer\": ", peer_->device) : "");
}

Upload Uploads::function() {
  return [this](const void* host, size_t bytes) {
    tensors_.push_back(upload_bytes(host, bytes, device_));
    return tensors_.back().const_data_ptr();
  };
}

int grid_budget(int64_t sm_budget) { return static_cast<int>(std::min<int64_t>(sm_budget, 1 << 20)); }

std::unique_ptr<Site> device_site(Job& job, bool only_explains) {
  // Tensors are on a device and no CUDA driver is loaded: this torch is for another vendor's.
  std::string why_not =
      cuda_in_use() ? driver_refusal() : "this build's kernels are CUDA's, and no CUDA driver is in use";
  if (!why_not.empty()) return site_without_cuda(job, std::move(why_not));
  return std::make_unique<CudaSite>(job, only_explains);
}

Choice CudaSite::choose(const Job& job) {
  const GpuCall call{job.work.direction, limits_.uses_host_page_tables ? Link::kCoherent : Link::kPcie,
                     limits_.capability, allows_batches() ? Copies::kBatched : Copies::kOneByOne,
                     job.work.bytes,     job.work.descriptors};
  const GpuAnswers answers{[&](Executor executor) { return room_of(executor).refusal(job, *this); },
                           [&] { return job.work.bytes > 0 ? staging(job).mean_copy_bytes() : 0; }};
  const std::optional<Choice> choice = choose_on_gpu(*gpu_policy(), call, answers, only_explains_);
  if (choice) return *choice;
  // Its refusal is then the call's error.
  return {no_code().empty() ? Executor::kKernel : Executor::kTriton, ""};
}

void CudaSite::with_fault_word(const std::function<void(const void* word)>& body) {
  FaultWord word(device());
  body(word.get());
  word.note_launches(stream_);
}

void begin_issuing() { begin_op(); }
bool may_have_issued() { return may_have_moved(); }

}  // namespace kvkernels
