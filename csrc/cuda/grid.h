// How many CTAs of how many warps a launch has at most.
#pragma once

#include <cstdint>

#include "core/cut.h"
#include "cuda/device.h"

namespace kvkernels {

// What a link to the host has to have on its way: more than its bandwidth times the round trip, which is 68 kB for PCIe
// Gen5 x16 and 491 kB for a GH200 (benchmarks/results/sass.md). What is beyond that only takes SMs from others.
constexpr int64_t kLinkBytes = 256 << 10;
constexpr int64_t kCoherentLinkBytes = 1 << 20;

// CTAs that find room beside other kernels': a quarter of the threads and registers that an SM has for the copy
// kernels.
constexpr int64_t kCtaWarps = 8;
constexpr int64_t kCtasPerSm = 4;
// On a host link: short fragments leave a warp so little to ask for that the whole device would be taken.
constexpr int64_t kMostLinkCtas = 64;

struct Grid {
  int64_t ctas;
  int64_t cta_warps;
};

// Bytes that a warp of the kernels asks for before it waits for the first of them.
int64_t warp_bytes_in_flight(const Work& work, const Cut& cut);

// A copy over a link gets as many warps as keep it busy, one within a device all SMs. With an `sm_budget` there are as
// many CTAs, or as the device has SMs, and so never more than one an SM: they have more warps each where the link, or
// the SM, would not be busy otherwise.
Grid most_of_grid(const Work& work, const Cut& cut, int sm_budget, const DeviceLimits& limits);

}  // namespace kvkernels
