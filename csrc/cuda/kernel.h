// Plans and launches the copy kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/issued.h"
#include "core/lower.h"
#include "cuda/copy_kernel.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/pointers.h"

namespace kvkernels {

struct KernelLaunch {
  Head head;
  std::vector<std::byte> tables;
  int ctas;
};

struct KernelPlan {
  std::string cut;  // JSON
  KernelVariant variant = KernelVariant::kPage;
  int64_t launches = 0;
  int ctas = 0;              // of the largest launch
  int threads = 0;           // of a CTA
  int64_t shared_bytes = 0;  // of a CTA, asked for at the launch
  int64_t tiles = 0;
  int64_t descriptors = 0;  // entries of the tables: moves and pairs, over all launches
  int64_t bytes = 0;
  int64_t table_bytes = 0;
  bool uploads = false;  // the tables do not fit in the parameters
  std::vector<KernelLaunch> parts;
};

// Copies host bytes to the current device in the stream's order and returns where; valid until the stream has passed.
using Upload = std::function<const void*(const void* host, size_t bytes)>;

// For the executors kernel and bulk, by work.executor. One launch over all moves and pairs, with one upload where the
// tables exceed the parameters; while capturing nothing is uploaded and there are several launches instead. `sm_budget`
// 0 is the policy's default. Calls no CUDA function.
KernelPlan plan_kernel(const Work& work, int sm_budget, const DeviceLimits& limits, bool capturing);

// Launches it on the current device. Throws CudaError.
Issued run_kernel(const KernelPlan& plan, const Upload& upload, cudaStream_t stream);

// What the caller knows the two sides by.
struct SideNames {
  const char* src = "src";
  const char* dst = "dst";
};

// Makes the host sides of `work` addresses that the current device can use. Throws std::invalid_argument, whose text is
// the reason alone, where it cannot. `may_migrate`: pageable memory will do also where touching it moves its pages to
// the device, and the host's next touch moves them back.
void map_for_device(Work& work, const DeviceLimits& limits, PointerMap& pointers, const SideNames& names = {},
                    bool may_migrate = true);

// Whether the host side of `work` is a destination in memory that is registered as read-only for the device.
bool writes_read_only(const Work& work, PointerMap& pointers);

}  // namespace kvkernels
