// Whether CUDA is in use, asked without its headers: a build without CUDA code has to know it, too.
#pragma once

namespace kvkernels {

// True only where this process has initialised CUDA already; never initialises it, so a call that concerns the CPU
// alone creates no context.
bool cuda_in_use();

}  // namespace kvkernels
