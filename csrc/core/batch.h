// swap_blocks_batch's rows, raw addresses and sizes, as copies that may be made in any order.
#pragma once

#include <cstdint>
#include <vector>

#include "core/plan.h"

namespace kvkernels {

// Columns on the host: addresses as 64 bits, sizes in bytes as int64 or int32.
struct BatchRows {
  IdColumn src;
  IdColumn dst;
  IdColumn bytes;
  int64_t count = 0;
};

// The copies to make, in the order of the rows and each once. ValueError for a row that cannot be one, for two rows
// that write one byte, and for a row that reads what one writes.
std::vector<Fragment> checked_rows(const char* op, const BatchRows& rows);

// The same, slower, with the rows sorted whole: what checked_rows turns to for rows that come twice, and for errors,
// since only this knows which rows to name.
std::vector<Fragment> checked_rows_by_sorting(const char* op, const BatchRows& rows);

// Keeps a list's memory for this thread's next call, which would otherwise fault its pages in again.
void recycle(std::vector<Fragment>&& fragments);

}  // namespace kvkernels
