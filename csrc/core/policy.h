// The numbers that lowering uses for the CPU, from this machine's caches or from a file.
#pragma once

#include <cstdint>
#include <string>

namespace kvkernels {

struct CpuPolicy {
  int64_t l2_bytes;                // one core's; 512 KiB where the system does not say
  int64_t l3_bytes;                // one cache's; 32 MiB where the system does not say, or says the sum over a machine
  int64_t stream_pool_bytes;       // calls from this size on stream into pools
  int64_t stream_soon_read_bytes;  // and into buffers that are read soon
  int64_t serial_bytes;            // calls below this size run on one lane
  int64_t lane_bytes;              // larger ones give each lane at least this
  int64_t sort_min_page_bytes;     // pages of these sizes, both included, ...
  int64_t sort_max_page_bytes;
  int64_t sort_bytes;    // ... are copied in the order of their sources in calls from this size on
  int64_t most_lanes;    // that a call is cut into
  std::string source{};  // where the numbers are from, for explain(); empty where they are the machine's

  bool operator==(const CpuPolicy&) const = default;

  // Into how many lanes a call is cut that may use `threads`, which is at least 1.
  int lanes_for(int64_t bytes, int threads) const;

  // Whether stores should bypass the caches; `soon_read` says that the destination is read right after the call.
  bool streams(int64_t bytes, bool soon_read) const;

  // Whether the pairs of a call should be sorted by source. Measured on Sapphire Rapids, before the sort's own cost: 4
  // KiB pages of a swap 1.06 to 1.09 times as fast without huge pages, 1.00 to 1.03 with them; 16 KiB ones 1.04
  // and 1.00; longer ones no faster.
  bool sorts(int64_t page_bytes, int64_t total_bytes) const;
};

// The numbers for a machine whose system reports these sizes: 0 or less where it does not say. Reports above 16 and
// 128 MiB are the sum over a machine.
CpuPolicy policy_of_caches(int64_t l2_bytes, int64_t l3_bytes);

// This machine's, which is read once, or what was set. KVKERNELS_STREAM_BYTES, a number of bytes, replaces both
// streaming thresholds of either (0: always stream); another value throws std::invalid_argument, at each call.
const CpuPolicy& cpu_policy();
const CpuPolicy& cpu_policy_of_machine();

// Serves what is lowered from then on, by any thread.
void set_cpu_policy(CpuPolicy policy);

}  // namespace kvkernels
