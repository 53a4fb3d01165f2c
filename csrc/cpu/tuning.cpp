#include "cpu/tuning.h"

#include <limits>

#include "core/setting.h"

namespace kvkernels::cpu {
namespace {

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// Where the rows come from, as shares of the streaming ceiling on one thread.
//
// Zen 4 (EPYC, model 17, thread CPU time, ceiling 21 to 25 GB/s), pages of 4 / 18 / 32 / 512 KiB:
//   four pages at once, whole, nothing ahead   0.64  0.76  0.88  1.01
//   two                                        0.56  0.64  0.79  0.96
//   four neighbours of 4 KiB, 1 KiB ahead      0.60  0.57  0.61  0.63
// and two shards joined, strips of 256 B: 0.92 with what is ahead prefetched, 0.80 without.
// Sapphire Rapids: 1.15 of the ceiling with four neighbours, 1.06 with two (by benchmarks/pages.py).
// Emerald Rapids (Xeon, model 207, thread CPU time, ceiling 10.5 to 12.5 GB/s, lower quartiles of settings that take
// turns in one process):
//                                         pages of 4 / 18 / 32 / 512 KiB   shards joined: NHD TP2  TP8  HND TP2  TP8
//   AVX2, two whole, nothing ahead        1.02  0.97  1.00  1.03           0.72  0.94  1.06  0.63
//   four whole, strips ahead              1.05  1.09  1.11  1.12           0.73  0.93  1.14  0.63
//   and pieces of rows from 2 KiB on      1.03  1.08  1.06  1.12           0.73  0.94  1.12  1.07
//   and from 1 KiB on                     1.04  1.09  1.11  1.14           0.96  0.95  1.10  1.07
//   AVX-512, four neighbours, all ahead   0.94  0.93  0.95  0.96           0.93  0.86  0.98  0.87
//   and pieces of rows from 2 KiB on      0.94  0.90  0.93  0.97           0.93  0.84  0.97  1.06
//   and from 1 KiB on                     0.93  0.94  0.94  0.95           0.87  0.86  0.97  1.04
//   four whole, strips ahead              0.98  1.01  0.97  1.01           0.93  0.85  1.00  1.07
// A row is of pieces of 1 KiB in NHD TP2 and of 4 KiB in HND TP8. One stream alone is 0.67 of that ceiling with AVX2
// and 0.87 with AVX-512. AMD with AVX2 alone is up to Zen 3, where three or more lose. Reported from a Zen 3 at a
// ceiling of 15.5 to 17 GB/s:
//   two neighbours of 4 KiB, 1 KiB ahead       10.4 GB/s at 4 KiB, 12.6 at 32 KiB, 13.6 at 512 KiB
//   two pages at once, whole, nothing ahead    12.4, 15.1 to 16.3, 17.0 to 17.9
//   shards joined, 256 B to 2 KiB rows         11.0 with what is ahead, 15.7 to 16.5 without, in any order
// With AVX2 on the Zen 4, rows of 2 KiB came to 0.88 written whole, to 0.45 shard by shard.
constexpr Tuning kTunings[] = {
    {"AMD with AVX-512, from Zen 4 on", Isa::kAvx512, true, 4, 1 << 20, false, true, true, kNever},
    {"Intel with AVX-512", Isa::kAvx512, false, 4, 4096, true, true, true, 2048},
    {"AMD with AVX2, up to Zen 3", Isa::kAvx2, true, 2, 1 << 20, false, false, true, kNever},
    {"Intel with AVX2", Isa::kAvx2, false, 4, 1 << 20, false, true, true, 1024},
    {"any", Isa::kPortable, false, 2, 4096, true, true, false, kNever},
};

Setting<Tuning>& setting() {
  // Never destroyed: a mover's threads may still copy when the process's statics go.
  static auto& setting = *new Setting<Tuning>;
  return setting;
}

}  // namespace

const Tuning& tuning_for(Isa isa) {
  const Tuning* found = &kTunings[0];
  while (found->isa != isa || (found->amd_only && !is_amd())) ++found;
  return *found;
}

const Tuning& tuning() {
  const Tuning& row = tuning_for(selected_isa());
  const Tuning* const set = setting().get();
  return set != nullptr ? *set : row;
}

void set_tuning(const Tuning& tuning) { setting().set(tuning); }

}  // namespace kvkernels::cpu
