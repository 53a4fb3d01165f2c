#include "ops/cuda_path.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "core/cuda_driver.h"
#include "core/gpu_policy.h"
#include "core/staged.h"
#include "cuda/bulk_kernel.h"
#include "cuda/device.h"
#include "cuda/dma.h"
#include "cuda/error.h"
#include "cuda/fault.h"
#include "cuda/kernel.h"
#include "cuda/pointers.h"
#include "cuda/staged.h"
#include "cuda/stream.h"
#include "ops/counters.h"
#include "ops/explain.h"
#include "ops/fault_ops.h"
#include "ops/json.h"
#include "ops/named_errors.h"
#include "ops/triton_path.h"

namespace kvkernels {
namespace {

// Where a call runs: its device, current, and that device's current stream.
class Context {
 public:
  explicit Context(int device)
      : device_(device),
        guard_(device),
        stream_(static_cast<cudaStream_t>(current_stream(device))),
        limits_(device_limits(device)),
        is_capturing_(kvkernels::is_capturing(stream_)),
        is_legacy_(kvkernels::is_legacy(stream_)) {}

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }
  const DeviceLimits& limits() const { return limits_; }
  bool is_capturing() const { return is_capturing_; }
  bool allows_batches() const {
    return !is_capturing_ && !is_legacy_ && driver_function("cuMemcpyBatchAsync", 12080) != nullptr;
  }
  // Why none of the library's own kernels runs here; empty where they do.
  std::string no_code() const {
    if (limits_.code_capability > 0) return "";
    return text("the library has no code for compute capability ", limits_.capability / 10, '.',
                limits_.capability % 10);
  }
  BulkFacts bulk() const {
    return {limits_.capability, limits_.code_capability, limits_.shared_bytes, kBulkSharedBytes};
  }
  std::string json() const {
    return text("\"index\": ", device_, ", \"capturing\": ", is_capturing_ ? "true" : "false",
                ", \"legacy_stream\": ", is_legacy_ ? "true" : "false");
  }

 private:
  int device_;
  DeviceGuard guard_;
  cudaStream_t stream_;
  DeviceLimits limits_;
  bool is_capturing_;
  bool is_legacy_;
};

[[noreturn]] void refuse(const char* op, Executor executor, const std::string& reason) {
  value_error(op, ": executor '", name_of(executor), "' cannot serve this call: ", reason);
}

// Freed after the launches: the allocator hands the memory out again on this stream only, behind the kernels.
class Uploads {
 public:
  explicit Uploads(int device) : device_(device) {}
  Upload function() {
    return [this](const void* host, size_t bytes) {
      tensors_.push_back(upload_bytes(host, bytes, device_));
      return tensors_.back().const_data_ptr();
    };
  }

 private:
  int device_;
  std::vector<Tensor> tensors_;
};

int grid_budget(int64_t sm_budget) { return static_cast<int>(std::min<int64_t>(sm_budget, 1 << 20)); }

void record_kernels(const char* op, const Work& work, const KernelPlan& plan, const Context& context,
                    const std::string& reason) {
  Explanation explanation = explanation_of(op, work, reason);
  explanation.launches = plan.launches;
  explanation.descriptors = plan.descriptors;
  explanation.device =
      text('{', context.json(), ", \"cut\": ", plan.cut, ", \"ctas\": ", plan.ctas, ", \"threads\": ", plan.threads,
           ", \"shared_bytes\": ", plan.shared_bytes, ", \"tiles\": ", plan.tiles,
           ", \"table_bytes\": ", plan.table_bytes, ", \"uploads\": ", plan.uploads ? "true" : "false", '}');
  record(explanation);
}

// The executors kernel and bulk.
void run_kernel_executor(const char* op, const Work& work, int64_t sm_budget, const Context& context,
                         const std::string& reason) {
  const KernelPlan plan = plan_kernel(work, grid_budget(sm_budget), context.limits(), context.is_capturing());
  if (explaining()) return record_kernels(op, work, plan, context, reason);
  Uploads uploads(context.device());
  const Issued issued = run_kernel(plan, uploads.function(), context.stream());
  count_issued(work.executor, issued.launches, issued.descriptors, issued.bytes);
}

void run_dma_executor(const char* op, const Work& work, bool any_source_order, const Context& context,
                      const std::string& reason) {
  if (explaining()) {
    const Issued planned = plan_dma(work, context.stream());
    Explanation explanation = explanation_of(op, work, reason);
    explanation.executor = Executor::kDma;
    explanation.launches = planned.launches;
    explanation.descriptors = planned.descriptors;
    explanation.device = text('{', context.json(), '}');
    return record(explanation);
  }
  const Issued issued = dma_copy(work, any_source_order, context.stream());
  count_issued(Executor::kDma, issued.launches, issued.descriptors, issued.bytes);
}

Staging stage(const Work& work, const Context& context) {
  if (!context.is_capturing()) return plan_staging(work);
  Staging staging;
  staging.refusal = "its stream is captured, and its ring on the device serves other calls before a replay";
  return staging;
}

// `lease` is there unless the call is only explained.
void run_staged_executor(const CopyCall& call, const Work& work, const Staging& staging, const RingLease* lease,
                         const Context& context, const std::string& reason) {
  const int budget = grid_budget(call.sm_budget);
  if (explaining()) {
    const Issued planned = plan_staged(work, staging, budget, context.limits());
    Explanation explanation = explanation_of(call.op, work, reason);
    explanation.launches = planned.launches;
    explanation.descriptors = planned.descriptors;
    const int64_t ring_bytes = staging.chunk_bytes * std::min<int64_t>(staging.chunks(), staging.parts);
    explanation.device =
        text('{', context.json(), ", \"ring_bytes\": ", ring_bytes, ", \"chunks\": ", staging.chunks(), '}');
    return record(explanation);
  }
  // Freed after the last launch.
  Uploads uploads(context.device());
  const Issued issued =
      run_staged(work, staging, lease->ring(), budget, context.limits(), uploads.function(), context.stream());
  count_issued(Executor::kStaged, issued.launches, issued.descriptors, issued.bytes);
}

// Makes `work` reachable for a kernel, or says why it is not. Memory that would move is for who names the kernel, or
// has no other choice.
std::string map_or_refuse(const CopyCall& call, Work& work, const Context& context) {
  PointerMap pointers;
  if (writes_read_only(work, pointers)) {
    value_error(call.op, ": ", call.dst_list,
                " must be writable for the device, got host memory that is registered as read-only");
  }
  const bool may_migrate = call.executor != Executor::kAuto || work.device_ids;
  try {
    map_for_device(work, context.limits(), pointers, {call.src_list, call.dst_list}, may_migrate);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void check_triton(const char* op, const Context& context) {
  const std::string refusal = triton_refusal(context.device());
  if (!refusal.empty()) refuse(op, Executor::kTriton, refusal);
}

// For ids on the device no copy engine serves: a kernel, or triton where the library has no code.
Executor choose_for_device_ids(const CopyCall& call, const Context& context) {
  const bool takes_kernels = context.no_code().empty();
  switch (call.executor) {
    case Executor::kAuto:
      if (takes_kernels) return Executor::kKernel;
      break;
    case Executor::kKernel:
    case Executor::kBulk:
      if (!takes_kernels) refuse(call.op, call.executor, context.no_code());
      return call.executor;
    case Executor::kTriton:
      break;
    default:
      refuse(call.op, call.executor, "the ids are on the device");
  }
  check_triton(call.op, context);
  return Executor::kTriton;
}

void carry_out_device_ids(const CopyCall& call, std::vector<Move> moves, Direction direction, const Context& context) {
  Work work = lower_device_ids(std::move(moves), device_ids_of(call), direction);
  work.executor = choose_for_device_ids(call, context);
  const std::string reason = call.executor == Executor::kAuto && work.executor == Executor::kTriton
                                 ? context.no_code()
                                 : "the ids are on the device";
  if (work.bytes == 0) {
    if (explaining()) record(explanation_of(call.op, work, reason));
    return;
  }
  std::string refusal = map_or_refuse(call, work, context);
  if (refusal.empty() && work.executor == Executor::kBulk) refusal = bulk_refusal(work.moves, context.bulk());
  if (!refusal.empty()) refuse(call.op, work.executor, refusal);
  if (work.executor != Executor::kTriton) {
    return run_kernel_executor(call.op, work, call.sm_budget, context, reason);
  }
  if (explaining()) return run_triton(call, work, context.device(), nullptr, reason);
  FaultWord word(context.device());
  run_triton(call, work, context.device(), word.get(), reason);
  word.note_launches(context.stream());
}

// Raises where the executor that the caller named cannot serve the call. `unreachable`: why a kernel cannot reach the
// host side, or "". `staging` is set where staged is named.
void check_named(const CopyCall& call, const Work& work, const Context& context, const std::string& unreachable,
                 const Staging& staging) {
  const Executor asked = call.executor;
  const auto refuse_if = [&](const std::string& reason) {
    if (!reason.empty()) refuse(call.op, asked, reason);
  };
  if (asked == Executor::kCpu) refuse(call.op, asked, "a tensor is on a cuda device");
  if (asked == Executor::kTriton) check_triton(call.op, context);
  if (asked == Executor::kKernel || asked == Executor::kBulk || asked == Executor::kStaged) {
    refuse_if(context.no_code());
  }
  if (asked == Executor::kKernel || asked == Executor::kBulk || asked == Executor::kTriton) refuse_if(unreachable);
  if (asked == Executor::kBulk && work.bytes > 0) refuse_if(bulk_refusal(work.moves, context.bulk()));
  if (asked == Executor::kStaged) refuse_if(staging.refusal);
}

// What `auto` takes. Sets `staging` where the choice may be staged; null where there is no memory for the ring.
GpuChoice choose(const Work& work, const Context& context, const std::string& unreachable, Staging* staging) {
  const std::string no_code = context.no_code();
  if (!no_code.empty() && work.direction == Direction::kDeviceToDevice && triton_refusal(context.device()).empty()) {
    return {Executor::kTriton, no_code};
  }
  GpuFacts facts{context.allows_batches(), no_code.empty() ? unreachable : no_code,
                 bulk_pays(work.moves, context.bulk())};
  if (staging != nullptr && no_code.empty() && staging_may_pay(work.direction, work.bytes, work.descriptors, facts) &&
      ring_may_be_had(context.device(), !explaining())) {
    *staging = stage(work, context);
    facts.staged_bytes = staging->mean_copy_bytes();
  }
  return choose_on_gpu(work.direction, work.bytes, work.descriptors, facts);
}

// A ring; none where there is no memory for one and `auto` may take something else.
std::optional<RingLease> lease_ring(const CopyCall& call, const Context& context) {
  try {
    return std::optional<RingLease>(std::in_place, context.device(), context.stream());
  } catch (const NoMemoryForRing&) {
    if (call.executor != Executor::kAuto) throw;
    return std::nullopt;
  }
}

void carry_out_host_ids(const CopyCall& call, std::vector<Move> moves, PairList list, Direction direction,
                        const Context& context) {
  // Lowered as for the copy engine, whose descriptors are what the choice depends on; a kernel takes any order.
  Work work =
      lower(std::move(moves), std::move(list), call.src_limit.ids(), direction, {Executor::kDma, 1, call.soon_read});
  Work mapped = work;
  const std::string unreachable = work.bytes > 0 ? map_or_refuse(call, mapped, context) : "";
  Staging staging;
  if (call.executor == Executor::kStaged && work.bytes > 0) staging = stage(work, context);
  check_named(call, work, context, unreachable, staging);
  GpuChoice choice{call.executor, "named by the caller"};
  if (call.executor == Executor::kAuto) choice = choose(work, context, unreachable, &staging);
  std::optional<RingLease> lease;
  if (choice.executor == Executor::kStaged && work.bytes > 0 && !explaining()) {
    lease = lease_ring(call, context);
    if (!lease) choice = choose(work, context, unreachable, nullptr);
  }
  work.executor = mapped.executor = choice.executor;
  if (work.bytes == 0) {
    if (explaining()) record(explanation_of(call.op, work, choice.reason));
  } else if (choice.executor == Executor::kKernel || choice.executor == Executor::kBulk) {
    run_kernel_executor(call.op, mapped, call.sm_budget, context, choice.reason);
  } else if (choice.executor == Executor::kStaged) {
    run_staged_executor(call, work, staging, lease ? &*lease : nullptr, context, choice.reason);
  } else if (choice.executor == Executor::kTriton) {
    run_triton(call, mapped, context.device(), nullptr, choice.reason);
  } else {
    run_dma_executor(call.op, work, false, context, choice.reason);
  }
  recycle(std::move(work.segments));
}

// What raw addresses are: which device, and which way the bytes go.
struct AddressFacts {
  int device = -1;
  bool src_on_device = false;
  bool dst_on_device = false;
  bool src_on_host = false;
  bool dst_on_host = false;
  bool dst_is_read_only = false;   // for the device
  const char* pageable = nullptr;  // the argument with an address of pageable memory
  std::string unreachable;         // why no device's kernel reaches all of them; empty where one may
};

void note_range(const char* op, const char* argument, const Range& range, AddressFacts& facts) {
  if (range.memory == Range::Memory::kDevice) {
    check_one_device(op, {facts.device >= 0, facts.device}, {true, range.device});
    facts.device = range.device;
  }
  if (range.memory == Range::Memory::kPageable) {
    facts.pageable = argument;
  } else if (!range.mapped) {
    facts.unreachable = text(argument, " is in host memory that is not mapped for the device");
  } else if (range.device_offset != 0) {
    facts.unreachable = text(argument, " is in host memory that the device sees at another address");
  }
}

// The device that a call is for; -1 where all addresses are the host's. What it asks needs no context.
int device_of(const std::vector<Fragment>& fragments) {
  PointerMap pointers(false);
  bool is_managed = false;
  for (const Fragment& copy : fragments) {
    const std::byte* const ends[] = {copy.src, copy.src + copy.bytes - 1, copy.dst, copy.dst + copy.bytes - 1};
    for (const std::byte* const end : ends) {
      const Range range = pointers.find(end);
      if (range.memory == Range::Memory::kDevice) return range.device;
      is_managed = is_managed || range.memory == Range::Memory::kManaged;
    }
  }
  return is_managed ? current_device() : -1;
}

// In the context of the call's device.
AddressFacts facts_of(const char* op, const std::vector<Fragment>& fragments) {
  AddressFacts facts;
  PointerMap pointers;
  const auto note = [&](const char* argument, const std::byte* begin, int64_t bytes, bool& on_device, bool& on_host) {
    // A fragment may cross from one registration into the next; of pageable memory one look is enough.
    for (auto at = reinterpret_cast<uintptr_t>(begin), end = at + static_cast<uintptr_t>(bytes); at < end;) {
      const Range range = pointers.find(reinterpret_cast<const std::byte*>(at));
      const bool is_device = range.memory == Range::Memory::kDevice || range.memory == Range::Memory::kManaged;
      (is_device ? on_device : on_host) = true;
      note_range(op, argument, range, facts);
      facts.dst_is_read_only =
          facts.dst_is_read_only || (&on_host == &facts.dst_on_host && range.memory == Range::Memory::kPinned &&
                                     pointers.is_read_only(reinterpret_cast<const void*>(at)));
      if (range.memory == Range::Memory::kPageable) return;
      at = range.end;
    }
  };
  // Side by side, because neighbours in the list are mostly of one allocation, which is then known.
  for (const Fragment& copy : fragments) note("src_ptrs", copy.src, copy.bytes, facts.src_on_device, facts.src_on_host);
  for (const Fragment& copy : fragments) note("dst_ptrs", copy.dst, copy.bytes, facts.dst_on_device, facts.dst_on_host);
  return facts;
}

Direction direction_of(const AddressFacts& facts) {
  if (!facts.src_on_host && !facts.dst_on_host) return Direction::kDeviceToDevice;
  return facts.dst_on_device && !facts.dst_on_host ? Direction::kHostToDevice : Direction::kDeviceToHost;
}

// Why no kernel can make these copies; empty where one can.
std::string kernel_refusal(const AddressFacts& facts, int sizes, Executor asked, const Context& context) {
  if (!context.no_code().empty()) return context.no_code();
  if (!facts.unreachable.empty()) return facts.unreachable;
  if (facts.pageable != nullptr && !context.limits().reads_pageable) {
    return text(facts.pageable, " is in pageable host memory, which the device cannot read");
  }
  if (facts.pageable != nullptr && asked == Executor::kAuto && !context.limits().uses_host_page_tables) {
    return text(facts.pageable,
                " is in pageable host memory, of which each page that a kernel touches moves to the device");
  }
  if (sizes > kMostSizes) return text("its fragments have more than ", kMostSizes, " sizes");
  return "";
}

// All the moves of kernels that share no pairs.
Work outline_of(const std::vector<Work>& works) {
  Work outline = works.front();
  outline.segments.clear();
  for (size_t i = 1; i < works.size(); ++i) {
    if (works[i].shape != outline.shape) outline.shape = Shape::kPage;
    outline.moves.push_back(works[i].moves.front());
    outline.pairs += works[i].pairs;
    outline.bytes += works[i].bytes;
    outline.descriptors += works[i].descriptors;
  }
  return outline;
}

// What plans come to that are carried out one after the other.
KernelPlan sum_of(const std::vector<KernelPlan>& plans) {
  KernelPlan sum = plans.front();
  for (size_t i = 1; i < plans.size(); ++i) {
    sum.launches += plans[i].launches;
    sum.ctas = std::max(sum.ctas, plans[i].ctas);
    sum.threads = std::max(sum.threads, plans[i].threads);
    sum.shared_bytes = std::max(sum.shared_bytes, plans[i].shared_bytes);
    sum.tiles += plans[i].tiles;
    sum.descriptors += plans[i].descriptors;
    sum.table_bytes += plans[i].table_bytes;
    sum.uploads = sum.uploads || plans[i].uploads;
  }
  return sum;
}

// The executors kernel and bulk: a move's pairs are those of its launch, so each size has launches of its own.
void run_kernels_on_addresses(const AddressCall& call, std::vector<Work>& works, Work outline, const Context& context,
                              const GpuChoice& choice) {
  std::vector<KernelPlan> plans;
  for (Work& work : works) {
    work.executor = choice.executor;
    plans.push_back(plan_kernel(work, grid_budget(call.sm_budget), context.limits(), context.is_capturing()));
  }
  outline.executor = choice.executor;
  if (explaining()) return record_kernels(call.op, outline, sum_of(plans), context, choice.reason);
  Uploads uploads(context.device());
  Issued issued;
  for (const KernelPlan& plan : plans) {
    const Issued more = run_kernel(plan, uploads.function(), context.stream());
    issued.launches += more.launches;
    issued.descriptors += more.descriptors;
    issued.bytes += more.bytes;
  }
  count_issued(choice.executor, issued.launches, issued.descriptors, issued.bytes);
}

// Raises where the executor that the caller named cannot serve addresses; `refusal` is a kernel's.
void check_named_for_addresses(const AddressCall& call, const std::string& refusal) {
  switch (call.executor) {
    case Executor::kAuto:
    case Executor::kDma:
      return;
    case Executor::kCpu:
      refuse(call.op, call.executor, "an address is on a cuda device");
    case Executor::kKernel:
    case Executor::kBulk:
      if (!refusal.empty()) refuse(call.op, call.executor, refusal);
      return;
    default:
      refuse_addresses(call.op, call.executor);
  }
}

// `joined` is what a copy engine would be given.
GpuChoice choose_for_addresses(const AddressCall& call, const Work& joined, const GpuFacts& facts) {
  if (call.executor != Executor::kAuto) return {call.executor, "named by the caller"};
  return choose_on_gpu(joined.direction, joined.bytes, joined.descriptors, facts);
}

}  // namespace

std::string driver_refusal() {
  // A runtime runs on drivers of its major version and later; every call of it fails on others.
  constexpr int kMajor = CUDART_VERSION / 1000;
  static_assert(kMajor == 12 || kMajor == 13, "which driver release is the first for this version of CUDA?");
  const int found = cuda_driver_version();
  if (found == 0 || found / 1000 >= kMajor) return "";
  return text("this library's code for CUDA ", kMajor, " needs driver ", kMajor == 13 ? 580 : 525,
              " or later, and the driver found is for CUDA ", found / 1000, '.', found % 1000 / 10);
}

namespace {

// An error after bytes may be on their way says that the destination is undefined.
template <class Body>
auto issuing_errors(const char* op, Body&& body) {
  begin_op();
  return named_errors(op, [&] {
    try {
      return body();
    } catch (const std::runtime_error& error) {
      if (!may_have_moved()) throw;
      throw std::runtime_error(text(error.what(), "; the destination is undefined"));
    }
  });
}

}  // namespace

void carry_out_on_cuda(const CopyCall& call, std::vector<Move> moves, PairList list) {
  // Tensors are on a device and no CUDA driver is loaded: this torch is for another vendor's.
  const std::string why_not =
      cuda_in_use() ? driver_refusal() : "this build's kernels are CUDA's, and no CUDA driver is in use";
  if (!why_not.empty()) return carry_out_on_triton(call, std::move(moves), std::move(list), why_not);
  issuing_errors(call.op, [&] {
    const Context context(call.src.place.on_device ? call.src.place.device : call.dst.place.device);
    const Direction direction = kvkernels::direction_of(call.src.place, call.dst.place);
    if (call.ids_on_device) return carry_out_device_ids(call, std::move(moves), direction, context);
    carry_out_host_ids(call, std::move(moves), std::move(list), direction, context);
  });
}

bool addresses_may_be_cuda() { return cuda_in_use(); }

bool carry_out_addresses_on_cuda(const AddressCall& call) {
  if (const std::string why_not = driver_refusal(); !why_not.empty()) {
    const auto touches_device = [](const Fragment& fragment) {
      return is_on_device(fragment.src) || is_on_device(fragment.src + fragment.bytes - 1) ||
             is_on_device(fragment.dst) || is_on_device(fragment.dst + fragment.bytes - 1);
    };
    if (std::none_of(call.fragments.begin(), call.fragments.end(), touches_device)) return false;
    throw std::runtime_error(text(call.op, ": addresses on a cuda device need CUDA code that runs: ", why_not));
  }
  return issuing_errors(call.op, [&] {
    const int device = device_of(call.fragments);
    if (device < 0) return false;
    const Context context(device);
    const AddressFacts facts = facts_of(call.op, call.fragments);
    if (facts.dst_is_read_only) {
      value_error(call.op,
                  ": dst_ptrs must be writable for the device, got host memory that is registered as read-only");
    }
    const Work joined = lower_fragments(call.fragments, direction_of(facts), {Executor::kDma, 1, false});
    // Neighbours that became one are of many sizes where random pages are of one.
    const int joined_sizes = count_sizes(joined.fragments);
    const int listed_sizes = count_sizes(call.fragments);
    const std::string refusal = kernel_refusal(facts, std::min(joined_sizes, listed_sizes), call.executor, context);
    check_named_for_addresses(call, refusal);
    GpuFacts gpu{context.allows_batches(), refusal};
    if (const GpuChoice choice = choose_for_addresses(call, joined, gpu); choice.executor == Executor::kDma) {
      run_dma_executor(call.op, joined, call.any_source_order, context, choice.reason);
      return true;
    }
    std::vector<Work> works =
        addresses_as_ids(listed_sizes < joined_sizes ? call.fragments : joined.fragments, joined.direction);
    const Work outline = outline_of(works);
    gpu.bulk_pays = bulk_pays(outline.moves, context.bulk());
    const GpuChoice choice = choose_for_addresses(call, joined, gpu);
    const std::string no_bulk = bulk_refusal(outline.moves, context.bulk());
    if (choice.executor == Executor::kBulk && !no_bulk.empty()) refuse(call.op, choice.executor, no_bulk);
    run_kernels_on_addresses(call, works, outline, context, choice);
    return true;
  });
}

std::string take_fault_json(int device) {
  if (!cuda_in_use() || !driver_refusal().empty()) return "{}";
  return named_errors("check_device", [&]() -> std::string {
    const std::optional<FaultRecord> fault = take_fault(device);
    if (!fault) return "{}";
    const char* op = fault->op < kFaultOps.size() ? kFaultOps[fault->op] : "";
    return text("{\"count\": ", fault->count, ", \"first_row\": ", fault->first_row, ", \"op\": ", quoted(op), '}');
  });
}

}  // namespace kvkernels
