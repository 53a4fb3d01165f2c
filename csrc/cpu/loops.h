// The inner loops, one set for each instruction set.
#pragma once

#include <cstdint>

#include "core/fragments.h"
#include "cpu/isa.h"
#include "cpu/tuning.h"

namespace kvkernels::cpu {

constexpr int64_t kLineBytes = 64;

// Where hardware prefetchers stop: lanes are cut at multiples of it.
constexpr int64_t kPieceBytes = 4096;

// Shorter pieces are copied one by one, with loops of their own for the usual sizes; in rows the tuning may interleave
// shorter ones, too.
constexpr int64_t kInterleaveMinBytes = 2048;

// How many pieces past the ones to be copied a loop may look at, to prefetch their sources.
constexpr int64_t kLookahead = 32;

// The three ways to copy two contiguous ranges that the ceiling is the best of.
enum class Ceiling { kOneStream, kTwoPages, kTwoHalves };

struct Loops {
  // Copies pieces[0, count); pieces[count, known) are only prefetched. With `streaming`, stores bypass the caches
  // and the caller fences.
  void (*copy_pieces)(const Fragment* pieces, int64_t count, int64_t known, bool streaming, const Tuning& tuning);
  // The same for pieces that follow each other in memory on one side: one after the other, or some at once, by size.
  void (*copy_in_order)(const Fragment* pieces, int64_t count, int64_t known, bool streaming, const Tuning& tuning);
  // For short fragments at regular distances, where a record each would cost more than the bytes.
  void (*copy_strips)(const Strip* strips, int64_t count, bool streaming, const Tuning& tuning);
  void (*ceiling)(std::byte* dst, const std::byte* src, int64_t bytes, Ceiling loop);
  void (*fence)();
  // The instructions that these are made of.
  Isa isa;
};

const Loops& loops_for(Isa isa);

// The name of the instructions that copies are made with: of the loops themselves rather than of what was asked for.
const char* instruction_set();

}  // namespace kvkernels::cpu
