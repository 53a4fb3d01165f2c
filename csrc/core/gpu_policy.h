// Which executor `auto` takes for a call with a tensor on a GPU: a table of four rows, and who takes small fragments.
#pragma once

#include <cstdint>
#include <string>

#include "core/lower.h"

namespace kvkernels {

// What the choice depends on besides the work itself.
struct GpuFacts {
  bool batches = false;        // the stream and the driver allow batched copies
  std::string kernel_refusal;  // why a kernel cannot reach the host side; empty where it can
  bool bulk_pays = false;
  int64_t staged_bytes = 0;  // of a copy over the link by way of a ring, on average; 0 where the ring cannot serve
};

// Fragments shorter than this on average, and at least `min_count` of them, go to the kernel.
struct GpuPolicyRow {
  Direction direction;
  bool batches;
  int64_t min_count;
  int64_t kernel_below_bytes;
};

// KVKERNELS_KERNEL_BELOW_BYTES, where set, replaces every row's limit. Never measured by this project on a GPU: the
// figures are published ones (docs/design.md names them).
GpuPolicyRow gpu_policy(Direction direction, bool batches);

// What bulk copies need: a device, and code, for this compute capability (in tens of a major version), and fragments
// that are worth one.
constexpr int kBulkCapability = 90;
constexpr int64_t kBulkMinBytes = 512;

// Of a device.
struct BulkFacts {
  int capability = 0;
  int code_capability = 0;   // what the kernels were compiled for
  int64_t shared_bytes = 0;  // that a CTA may have
  int64_t needed_bytes = 0;  // that the kernel's CTA has
};

// Why the executor bulk cannot serve the call; empty where it can.
std::string bulk_refusal(const std::vector<Move>& moves, const BulkFacts& facts);

// Whether bulk copies are worth more than the kernel's: on devices of the data centre, for long aligned fragments.
bool bulk_pays(const std::vector<Move>& moves, const BulkFacts& facts);

// Whether it is worth finding out what staging comes to.
bool staging_may_pay(Direction direction, int64_t bytes, int64_t descriptors, const GpuFacts& facts);

Choice choose_on_gpu(Direction direction, int64_t bytes, int64_t descriptors, const GpuFacts& facts);

}  // namespace kvkernels
