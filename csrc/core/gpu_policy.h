// Which executor `auto` takes for a call with a tensor on a GPU: the first row of a table that fits the call, and whose
// executor does not refuse it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/lower.h"

namespace kvkernels {

// Between the host and a device: coherent where the device follows the host's page tables.
enum class Link { kPcie, kCoherent };
std::string_view name_of(Link link);

// How the copy engine is handed its copies: by one call, where the stream and the driver allow it, or a call each.
enum class Copies { kOneByOne, kBatched };
std::string_view name_of(Copies copies);

// What is not there limits nothing.
struct PolicyRow {
  Executor executor = Executor::kAuto;
  std::optional<Direction> direction{};
  std::optional<Link> link{};
  std::optional<int> capability_at_least{};  // in tens of a major version
  std::optional<int> capability_below{};
  std::optional<Copies> copies{};
  std::optional<int64_t> count_at_least{};  // of contiguous fragments, after neighbours were joined
  std::optional<int64_t> count_below{};
  std::optional<int64_t> fragment_bytes_below{};      // on average
  std::optional<int64_t> ring_copy_bytes_at_least{};  // of staged: its copies over the link, on average
  std::optional<int64_t> sm_budget{};                 // for calls that name none
};

struct GpuPolicy {
  std::vector<PolicyRow> rows;
  std::string source;  // as explain() calls it
};

const GpuPolicy& default_gpu_policy();

// What serves: the default until another is set.
std::shared_ptr<const GpuPolicy> gpu_policy();
void set_gpu_policy(GpuPolicy policy);

// What rows are compared with.
struct GpuCall {
  Direction direction;
  Link link;
  int capability;
  Copies copies;
  int64_t bytes;
  int64_t count;
};

// What is asked of an executor when a row with it fits.
struct GpuAnswers {
  std::function<std::string(Executor)> refusal;  // empty where it serves
  std::function<int64_t()> ring_copy_bytes;      // of a call that staged does not refuse
};

// Where no row serves, the first of dma, kernel and triton that does; nullopt where none of them does.
// KVKERNELS_KERNEL_BELOW_BYTES, where set, replaces the limits in bytes of all rows for calls between host and device.
// The words of a reason take longer than the choice: without `wants_reason` there are none.
std::optional<Choice> choose_on_gpu(const GpuPolicy& policy, const GpuCall& call, const GpuAnswers& answers,
                                    bool wants_reason = true);

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

}  // namespace kvkernels
