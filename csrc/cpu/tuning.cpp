#include "cpu/tuning.h"

namespace kvkernels::cpu {
namespace {

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Where the rows come from, as shares of the streaming ceiling on one thread.
//
// Zen 4 (EPYC, model 17, thread CPU time, ceiling 21 to 25 GB/s), pages of 4 / 18 / 32 / 512 KiB:
//   four pages at once, whole, nothing ahead   0.64  0.76  0.88  1.01
//   two                                        0.56  0.64  0.79  0.96
//   four neighbours of 4 KiB, 1 KiB ahead      0.60  0.57  0.61  0.63
// and two shards joined, strips of 256 B: 0.92 with what is ahead prefetched, 0.80 without.
// Sapphire Rapids: 1.15 of the ceiling with four neighbours, 1.06 with two (by benchmarks/pages.py).
// AVX2 alone is AMD up to Zen 3, where three or more lose. Reported from a Zen 3 at a ceiling of 15.5 to 17 GB/s:
//   two neighbours of 4 KiB, 1 KiB ahead       10.4 GB/s at 4 KiB, 12.6 at 32 KiB, 13.6 at 512 KiB
//   two pages at once, whole, nothing ahead    12.4, 15.1 to 16.3, 17.0 to 17.9
//   shards joined, 256 B to 2 KiB rows         11.0 with what is ahead, 15.7 to 16.5 without, in any order
// With AVX2 on the Zen 4, rows of 2 KiB came to 0.88 written whole, to 0.45 shard by shard.
constexpr Tuning kTunings[] = {
    {"AMD with AVX-512, from Zen 4 on", Isa::kAvx512, true, 4, 1 << 20, false, true, true},
    {"Intel with AVX-512", Isa::kAvx512, false, 4, 4096, true, true, true},
    {"AVX2", Isa::kAvx2, false, 2, 1 << 20, false, false, true},
    {"any", Isa::kPortable, false, 2, 4096, true, true, false},
};

}  // namespace

const Tuning& tuning_for(Isa isa) {
  const Tuning* found = &kTunings[0];
  while (found->isa != isa || (found->amd_only && !is_amd())) ++found;
  return *found;
}

}  // namespace kvkernels::cpu
