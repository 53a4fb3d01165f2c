// Drives the torch-free CUDA host code on the stand-in for CUDA, through C functions for ctypes. A kernel launch runs
// the kernels' own per-thread code on the host, with every access checked.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "core/cuda_driver.h"
#include "core/lower.h"
#include "cuda/bulk_body.h"
#include "cuda/bulk_kernel.h"
#include "cuda/copy_body.h"
#include "cuda/copy_kernel.h"
#include "cuda/device.h"
#include "cuda/dma.h"
#include "cuda/error.h"
#include "cuda/fault.h"
#include "cuda/kernel.h"
#include "cuda/pointers.h"
#include "cuda/staged.h"
#include "cuda/stream.h"
#include "fake.h"

extern "C" uintptr_t fake_kernel_reach(uintptr_t address, uintptr_t* begin);
extern "C" void fake_set_runner(fake::Runner runner, fake::ParameterBytes parameter_bytes);

using namespace kvkernels;

namespace {

thread_local std::string message;

// What a launch may touch and what it did, byte by byte, inside one watched range.
struct Watch {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  uint8_t* writes = nullptr;
};

Watch watch;
std::string violation;
int64_t loads_by_width[17];
int loads_in_flight = 0;
int deepest_flight = 0;

struct CheckedAccess {
  static bool may_touch(const void* pointer, size_t bytes) {
    static uintptr_t begin = 0;
    static uintptr_t end = 0;
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (address % bytes != 0) return fail("misaligned", address, bytes);
    if (address < begin || address + bytes > end || is_new_launch) {
      is_new_launch = false;
      end = fake_kernel_reach(address, &begin);
    }
    return address >= begin && address + bytes <= end ? true : fail("out of reach", address, bytes);
  }

  static bool fail(const char* what, uintptr_t address, size_t bytes) {
    char text[96];
    std::snprintf(text, sizeof text, "%s: %zu bytes at %#zx", what, bytes, static_cast<size_t>(address));
    if (violation.empty()) violation = text;
    return false;
  }

  template <class V>
  static void load(V& v, const std::byte* address) {
    ++loads_by_width[sizeof(V)];
    if (++loads_in_flight > deepest_flight) deepest_flight = loads_in_flight;
    v = V{};
    if (may_touch(address, sizeof(V))) std::memcpy(&v, address, sizeof(V));
  }

  template <class V>
  static void store(std::byte* address, const V& v) {
    loads_in_flight = 0;
    if (!may_touch(address, sizeof(V))) return;
    std::memcpy(address, &v, sizeof(V));
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (watch.writes == nullptr || at < watch.begin || at >= watch.end) return;
    for (size_t i = 0; i < sizeof(V); ++i) {
      if (watch.writes[at - watch.begin + i] < 255) ++watch.writes[at - watch.begin + i];
    }
  }

  static void record(Fault* fault, unsigned op, int64_t row) {
    if (may_touch(fault, 8)) GlobalAccess::record(fault, op, row);
  }

  static inline bool is_new_launch = true;
};

// What a bulk copy refuses, done at once.
struct CheckedRing {
  uint32_t stage_bytes;

  void copy(const std::byte* src, std::byte* dst, uint32_t bytes) {
    if (bytes % 16 != 0 || bytes > stage_bytes) CheckedAccess::fail("a bulk copy's size", bytes, bytes);
    for (uint32_t at = 0; at < bytes; at += 16) {
      Bytes16 v;
      CheckedAccess::load(v, src + at);
      CheckedAccess::store(dst + at, v);
    }
  }
  void finish() {}
};

void copy_bulk(const Head& head, const std::byte* tables, uint32_t thread, uint32_t threads) {
  CheckedRing ring{head.unit_bytes};
  kvkernels::copy_bulk<CheckedAccess>(head, tables, ring, thread, threads);
}

using Body = void (*)(const Head&, const std::byte*, uint32_t, uint32_t);

Body body_of(const std::string& kernel) {
  if (kernel.starts_with("kvkernels_copy_page_")) return copy_page<CheckedAccess>;
  if (kernel.starts_with("kvkernels_copy_row_")) return copy_row<CheckedAccess>;
  if (kernel.starts_with("kvkernels_copy_bytes_")) return copy_bytes<CheckedAccess>;
  if (kernel.starts_with("kvkernels_copy_bulk_")) return copy_bulk;
  return nullptr;
}

// The copy kernels have one parameter.
size_t parameter_bytes(const char* kernel, size_t index) {
  const std::string name = kernel;
  if (index > 0 || body_of(name) == nullptr) return 0;
  return name.ends_with("_small") ? kSmallParams : name.ends_with("_large") ? kLargeParams : sizeof(Head);
}

// The parameters are copied to where nothing else is, as a launch does: what it needs must be inside them.
int run(const char* kernel, void** arguments, unsigned ctas, unsigned threads, size_t shared_bytes) {
  const Body body = body_of(kernel);
  if (body == nullptr) return cudaErrorInvalidDeviceFunction;
  const size_t bytes = parameter_bytes(kernel, 0);
  std::vector<Bytes16> parameters((bytes + 15) / 16);
  std::memcpy(parameters.data(), arguments[0], bytes);
  const Head& head = *reinterpret_cast<const Head*>(parameters.data());
  const std::byte* tables = head.tables;
  if (bytes != sizeof(Head)) {
    tables = reinterpret_cast<const std::byte*>(parameters.data()) + offsetof(Params<kSmallParams>, tables);
  }
  violation.clear();
  if (body == copy_bulk && shared_bytes != bulk_shared_bytes(head.unit_bytes)) return cudaErrorInvalidValue;
  CheckedAccess::is_new_launch = true;
  for (uint32_t thread = 0; thread < ctas * threads; ++thread) {
    loads_in_flight = 0;
    body(head, tables, thread, ctas * threads);
  }
  if (violation.empty()) return 0;
  message = violation;
  return cudaErrorIllegalAddress;
}

[[maybe_unused]] const bool is_registered = (fake_set_runner(run, parameter_bytes), true);

template <class Function>
int guarded(Function function) {
  try {
    function();
    return 0;
  } catch (const CudaError& error) {
    message = message.empty() ? error.what() : error.what() + (" [" + message + "]");
    return 1;
  } catch (const std::invalid_argument& error) {
    message = error.what();
    return 2;
  } catch (const std::exception& error) {
    message = error.what();
    return 3;
  }
}

std::byte* pointer(int64_t address) { return reinterpret_cast<std::byte*>(address); }

// A move is 20 numbers: source and destination base, block stride, sub-block stride and sub-blocks; fragment bytes,
// loops, three loops of extent, source and destination stride (outermost first), and whether its pages merge.
constexpr int kMoveColumns = 20;

Move read_move(const int64_t* row) {
  Move move{};
  move.src = {pointer(row[0]), row[1], row[2], row[3]};
  move.dst = {pointer(row[4]), row[5], row[6], row[7]};
  move.fragment_bytes = row[8];
  move.loop_count = static_cast<int>(row[9]);
  for (int i = 0; i < move.loop_count; ++i) move.loops[i] = {row[10 + 3 * i], row[11 + 3 * i], row[12 + 3 * i]};
  move.merges = row[19] != 0;
  return move;
}

Work read_work(const int64_t* moves, int64_t move_count, const int64_t* segments, int64_t segment_count, int direction,
               int64_t device_rows) {
  Work work;
  work.direction = static_cast<Direction>(direction);
  work.pairs = device_rows;
  for (int64_t i = 0; i < segment_count; ++i) {
    work.segments.push_back({segments[3 * i], segments[3 * i + 1], segments[3 * i + 2]});
    work.pairs += segments[3 * i + 2];
  }
  for (int64_t i = 0; i < move_count; ++i) {
    const Move move = read_move(moves + kMoveColumns * i);
    work.moves.push_back(move);
    work.bytes += work.pairs * move.bytes_per_pair();
    work.descriptors += move.merges ? segment_count : work.pairs * move.fragments_per_pair();
  }
  return work;
}

void write_issued(const Issued& issued, int64_t* out) {
  out[0] = issued.launches;
  out[1] = issued.descriptors;
  out[2] = issued.bytes;
}

// Uploads live until drive_free_uploads: giving them back would synchronise.
std::vector<void*> uploads;

const void* upload(const void* host, size_t bytes, cudaStream_t stream) {
  void* device = nullptr;
  check(cudaMalloc(&device, bytes), "cudaMalloc");
  uploads.push_back(device);
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyDefault, stream), "cudaMemcpyAsync");
  return device;
}

}  // namespace

// Launches run the kernels' per-thread code here; the simulator may have taken them over.
EXPORT void drive_use_host_code() { fake_set_runner(run, parameter_bytes); }

EXPORT const char* drive_message() { return message.c_str(); }

// Counts how often kernels write each byte of a range.
EXPORT void drive_watch(uintptr_t begin, int64_t bytes, uint8_t* writes) {
  watch = {begin, begin + static_cast<uintptr_t>(bytes), writes};
}

EXPORT void drive_loads(int64_t* by_width, int64_t* deepest) {
  std::memcpy(by_width, loads_by_width, sizeof loads_by_width);
  *deepest = deepest_flight;
  std::memset(loads_by_width, 0, sizeof loads_by_width);
  deepest_flight = 0;
}

EXPORT int drive_dma(const int64_t* moves, int64_t move_count, const int64_t* segments, int64_t segment_count,
                     int direction, int any_order, int plans_only, void* stream, int64_t* out) {
  return guarded([&] {
    message.clear();
    const Work work = read_work(moves, move_count, segments, segment_count, direction, 0);
    const auto on = static_cast<cudaStream_t>(stream);
    write_issued(plans_only ? plan_dma(work, on) : dma_copy(work, any_order != 0, on), out);
  });
}

// Fragments are rows of source, destination and bytes.
EXPORT int drive_fragments(const int64_t* rows, int64_t count, int any_order, int plans_only, void* stream,
                           int64_t* out) {
  return guarded([&] {
    message.clear();
    std::vector<Fragment> fragments;
    for (int64_t i = 0; i < count; ++i) {
      fragments.push_back({pointer(rows[3 * i]), pointer(rows[3 * i + 1]), rows[3 * i + 2]});
    }
    const auto on = static_cast<cudaStream_t>(stream);
    write_issued(
        plans_only ? plan_dma(fragments.data(), count, on) : dma_copy(fragments.data(), count, any_order != 0, on),
        out);
  });
}

// `ids` is null or: source data, stride, width; destination data, stride, width; rows; limits; skip_negative; op.
// `options`: direction, sm_budget, items of a launch (0: the default), whether it captures, whether to map (2: memory
// that would not move), to run, and to use bulk copies.
// `out`: launches, ctas, threads, tiles, descriptors, bytes, table bytes, uploads, variant; then what was issued.
EXPORT int drive_kernel(const int64_t* moves, int64_t move_count, const int64_t* segments, int64_t segment_count,
                        const int64_t* ids, const int64_t* options, void* stream, int64_t* out) {
  return guarded([&] {
    message.clear();
    Work work = read_work(moves, move_count, segments, segment_count, static_cast<int>(options[0]), ids ? ids[6] : 0);
    work.executor = options[6] != 0 ? Executor::kBulk : Executor::kKernel;
    if (ids) {
      DeviceIds& device_ids = work.device_ids.emplace();
      device_ids.src = {pointer(ids[0]), ids[1], static_cast<int>(ids[2])};
      device_ids.dst = {pointer(ids[3]), ids[4], static_cast<int>(ids[5])};
      device_ids.rows = ids[6];
      device_ids.src_limit = ids[7];
      device_ids.dst_limit = ids[8];
      device_ids.skip_negative = ids[9] != 0;
      device_ids.op = static_cast<uint32_t>(ids[10]);
    }
    DeviceLimits limits = device_limits(current_device());
    if (options[2] > 0) limits.max_items = options[2];
    limits.reads_pageable = fake::setting("pageable_access") != 0;
    limits.uses_host_page_tables = fake::setting("host_page_tables") != 0;
    PointerMap pointers;
    if (options[4] != 0) {
      if (writes_read_only(work, pointers)) throw std::invalid_argument("dst is read-only for the device");
      map_for_device(work, limits, pointers, {}, options[4] == 1);
    }
    const KernelPlan plan = plan_kernel(work, static_cast<int>(options[1]), limits, options[3] != 0);
    const int64_t planned[] = {plan.launches,    plan.ctas,        plan.threads,
                               plan.tiles,       plan.descriptors, plan.bytes,
                               plan.table_bytes, plan.uploads,     static_cast<int64_t>(plan.variant)};
    std::memcpy(out, planned, sizeof planned);
    if (options[5] == 0) return;
    const auto on = static_cast<cudaStream_t>(stream);
    const auto send = [&](const void* host, size_t bytes) { return upload(host, bytes, on); };
    write_issued(run_kernel(plan, send, on), out + 9);
  });
}

// `options`: direction, sm_budget, bytes of the ring (0: the default), whether only to plan. `out`: what was issued,
// the chunks, and the bytes of the ring that they take.
EXPORT int drive_staged(const int64_t* moves, int64_t move_count, const int64_t* segments, int64_t segment_count,
                        const int64_t* options, void* stream, int64_t* out) {
  return guarded([&] {
    message.clear();
    const Work work = read_work(moves, move_count, segments, segment_count, static_cast<int>(options[0]), 0);
    const Staging staging = plan_staging(work, options[2] > 0 ? options[2] : kStagingRingBytes);
    if (!staging.refusal.empty()) throw std::invalid_argument(staging.refusal);
    const auto on = static_cast<cudaStream_t>(stream);
    const auto budget = static_cast<int>(options[1]);
    const DeviceLimits limits = device_limits(current_device());
    out[3] = staging.chunks();
    out[4] = staging.chunk_bytes * staging.parts;
    if (options[3] != 0) return write_issued(plan_staged(work, staging, budget, limits), out);
    const RingLease lease(current_device(), on);
    const auto send = [&](const void* host, size_t bytes) { return upload(host, bytes, on); };
    write_issued(run_staged(work, staging, lease.ring(), budget, limits, send, on), out);
  });
}

EXPORT int drive_free_uploads() {
  return guarded([&] {
    message.clear();
    for (void* device : uploads) check(cudaFree(device), "cudaFree");
    uploads.clear();
  });
}

EXPORT int64_t drive_divide(int64_t n, int64_t divisor, int is_wide) {
  if (is_wide) return make_wide_divisor(divisor).divide(n);
  return make_divisor(divisor).divide(static_cast<uint32_t>(n));
}

// `out`: whether there was a fault, then count, row, op.
EXPORT int drive_take_fault(int device, int64_t* out) {
  return guarded([&] {
    message.clear();
    const std::optional<FaultRecord> record = take_fault(device);
    out[0] = record.has_value();
    if (!record) return;
    out[1] = static_cast<int64_t>(record->count);
    out[2] = static_cast<int64_t>(record->first_row);
    out[3] = record->op;
  });
}

EXPORT int drive_is_capturing(void* stream, int64_t* out) {
  return guarded([&] {
    message.clear();
    *out = is_capturing(static_cast<cudaStream_t>(stream));
  });
}

EXPORT int drive_is_legacy(void* stream) { return is_legacy(static_cast<cudaStream_t>(stream)); }
EXPORT int drive_cuda_in_use() { return cuda_in_use(); }

// `out`: SMs, capability, the capability of the code, bytes of shared memory, whether it reads pageable memory, and by
// the host's page tables.
EXPORT int drive_limits(int device, int64_t* out) {
  return guarded([&] {
    message.clear();
    const DeviceGuard guard(device);
    const DeviceLimits limits = device_limits(device);
    out[0] = limits.sm_count;
    out[1] = limits.capability;
    out[2] = limits.code_capability;
    out[3] = limits.shared_bytes;
    out[4] = limits.reads_pageable;
    out[5] = limits.uses_host_page_tables;
  });
}

// `out`, per address: memory, begin, end, device, whether the device can address it, the device's offset.
EXPORT int drive_find(const int64_t* addresses, int64_t count, int has_context, int64_t* out) {
  return guarded([&] {
    message.clear();
    PointerMap pointers(has_context != 0);
    for (int64_t i = 0; i < count; ++i) {
      const Range range = pointers.find(pointer(addresses[i]));
      const int64_t row[] = {static_cast<int64_t>(range.memory),
                             static_cast<int64_t>(range.begin),
                             static_cast<int64_t>(range.end),
                             range.device,
                             range.mapped,
                             range.device_offset};
      std::memcpy(out + 6 * i, row, sizeof row);
    }
  });
}
