// The inner loops, one set for each instruction set.
#pragma once

#include <cstdint>

#include "core/fragments.h"
#include "cpu/isa.h"

namespace kvkernels::cpu {

constexpr int64_t kLineBytes = 64;

// Longer fragments reach the loops in pieces of about this size: the hardware prefetchers stop at 4 KiB, and
// pieces of one size are what can be interleaved.
constexpr int64_t kPieceBytes = 4096;

// Shorter pieces are copied one by one, with loops of their own for the usual sizes.
constexpr int64_t kInterleaveMinBytes = 2048;

// How many pieces past the ones to be copied a loop may look at, to prefetch their sources.
constexpr int64_t kLookahead = 32;

// The three ways to copy two contiguous ranges that the ceiling is the best of.
enum class Ceiling { kOneStream, kTwoPages, kTwoHalves };

struct Loops {
  // Copies pieces[0, count); pieces[count, known) are only prefetched. With `streaming`, stores bypass the caches
  // and the caller fences.
  void (*copy_pieces)(const Fragment* pieces, int64_t count, int64_t known, bool streaming);
  // For short fragments at regular distances, where a record each would cost more than the bytes.
  void (*copy_strips)(const Strip* strips, int64_t count, bool streaming);
  void (*ceiling)(std::byte* dst, const std::byte* src, int64_t bytes, Ceiling loop);
  void (*fence)();
  // Whether rows of the destination are better written whole, by moves in turns if need be, than rows of the source
  // read whole.
  bool writes_rows;
  // The instructions that these are made of.
  Isa isa;
};

const Loops& loops_for(Isa isa);

// The name of the instructions that copies are made with: of the loops themselves rather than of what was asked for.
const char* instruction_set();

}  // namespace kvkernels::cpu
