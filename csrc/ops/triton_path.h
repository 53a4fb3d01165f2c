// The triton executor: C++ checks and lowers, Python launches the kernels.
#pragma once

#include <string>

#include "ops/copy_call.h"

namespace kvkernels {

// Why the Triton kernels cannot serve a call, `device` -1 being the host; empty where they can. Host memory that they
// would have to reach is for the caller to check.
std::string triton_refusal(int device);

// A lowered call, whose host sides the device reaches. `fault` is the device's word, or null where Python keeps it.
void run_triton(const CopyCall& call, const Work& work, int device, const void* fault, const std::string& reason);

// A call that nothing else can serve, as `why_no_other` says; raises where the Triton kernels cannot either.
void carry_out_on_triton(const CopyCall& call, std::vector<Move> moves, PairList list, const std::string& why_no_other);

}  // namespace kvkernels
