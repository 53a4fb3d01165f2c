// The CPU executor: copies what a Work says with the processor's own instructions.
#pragma once

#include <cstdint>

#include "core/issued.h"
#include "core/lower.h"
#include "cpu/isa.h"
#include "cpu/tuning.h"

namespace kvkernels::cpu {

// Runs body(context, lane) for each lane in [0, lanes), perhaps in parallel, and returns when all are done.
using ParallelFor = void (*)(int lanes, void* context, void (*body)(void* context, int lane));

// Copies everything in `work` with work.lanes lanes of about the same bytes and, where work.streaming, with
// stores that bypass the caches; those are visible to other threads when this returns. `parallel` may be null
// where work.lanes is 1. Touches no byte outside a fragment. `isa` must be supported.
Issued copy(const Work& work, ParallelFor parallel, Isa isa, const Tuning& tuning);

// The same with selected_isa(), whose exception comes before the first byte, and tuning().
Issued copy(const Work& work, ParallelFor parallel);

// What lane `lane` of work.lanes copies, alone: a part of about the same bytes as the others. All lanes of a work must
// be given one tuning, which says where they are cut.
Issued copy_lane_of(const Work& work, int lane, const Tuning& tuning);

// Whether, with selected_isa(), rows of the destination are better written whole than rows of the source read whole.
bool writes_rows();

}  // namespace kvkernels::cpu
