// In which order a call's moves are copied: one after the other, or some of them in turns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/lower.h"

namespace kvkernels::cpu {

// Whether the fragments are short ones at regular distances.
bool goes_in_strips(const Move& move);

constexpr size_t kZipMost = 16;  // moves in one stretch that are zipped

// Moves [first, last), which hold `bytes` of the work. Where row_bytes is not 0 they are zipped: a fragment of each in
// turn, because together they fill rows of the destination, or read rows of the source, that each alone takes in
// stripes, as shards side by side do.
struct Stretch {
  size_t first;
  size_t last;
  int64_t bytes;
  int64_t row_bytes;
};

// The stretch that begins with this move. `writes_rows`: rows of the destination count as well as those of the source.
Stretch stretch_from(const Work& work, size_t first, bool writes_rows);

}  // namespace kvkernels::cpu
