// The table that the Triton kernels work from: a head, a row a move, a row a pair. kvkernels/triton/table.py names the
// columns for Python and for the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "core/lower.h"

namespace kvkernels {

// What holds for a whole call; flags are 0 or 1.
struct TritonHead {
  int64_t kernel = 0;  // 0 page, 1 row, 2 bytes
  int64_t width = 0;   // bytes of an element; both sides' addresses have the same remainder by it
  int64_t is_chunked = 0;
  int64_t links_host = 0;
  int64_t moves = 0;
  int64_t pieces = 0;
  int64_t loop_levels = 0;
  int64_t has_subblocks = 0;
  int64_t is_ragged = 0;
  int64_t cuts_on_src = 0;
  int64_t src_ids = 0;  // address; in the table, from its begin
  int64_t src_ids_stride_bytes = 0;
  int64_t src_ids_width = 0;
  int64_t dst_ids = 0;
  int64_t dst_ids_stride_bytes = 0;
  int64_t dst_ids_width = 0;
  int64_t ids_on_device = 0;
  int64_t src_limit = 0;
  int64_t dst_limit = 0;
  int64_t skips_negative = 0;
  int64_t fault_op = 0;
  int64_t fault = 0;  // address of the device's fault word; 0 where Python has it
  int64_t sm_budget = 0;
  int64_t device = -1;
};

// Completes the head, of which the caller sets fault, sm_budget and device, and makes the table, whose first row it is.
std::vector<int64_t> triton_table(const Work& work, TritonHead& head);

}  // namespace kvkernels
