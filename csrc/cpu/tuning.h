// How long copies go fastest, which differs between processors more than between instruction sets.
#pragma once

#include <cstdint>
#include <string_view>

#include "cpu/isa.h"

namespace kvkernels::cpu {

struct Tuning {
  std::string_view processors;
  Isa isa;
  bool amd_only;
  // So many long pieces are copied at once, a step of each in turn: 2 or 4.
  int interleave;
  // Longer fragments are cut into pieces of about this size. Short ones make neighbours of one page take turns, long
  // ones different pages.
  int64_t piece_bytes;
  // Whether the lines ahead inside a piece are prefetched, and not only the beginnings of the pieces that come next.
  bool prefetches_within;
  // Whether the fragments ahead in a strip are.
  bool prefetches_strips;
  // Whether rows of the destination are better written whole, by moves in turns if need be, than rows of the source
  // read whole.
  bool writes_rows;
  // From which size on the pieces of such rows, too, are copied so many at once; below it they are copied one by one.
  int64_t rows_interleave_from_bytes;

  bool operator==(const Tuning&) const = default;
};

// The first row of the table that is for this processor and these instructions.
const Tuning& tuning_for(Isa isa);

// The one for selected_isa(), whose exception this throws, or what was set. It never changes: a copy that is carried
// out in parts is cut as one tuning says, whatever is set meanwhile.
const Tuning& tuning();

// Serves what begins from then on, by any thread.
void set_tuning(const Tuning& tuning);

}  // namespace kvkernels::cpu
