// Which kernels this program holds, and which of them were launched. Neither is a list kept here: nvcc's start-up code
// registers every kernel under its name and csrc/cuda launches by cudaLaunchKernelExC, and the linker's --wrap
// (CMakeLists.txt) sends both past this file first.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/lower.h"

namespace kvkernels::sanitizer {

// What the kernels that are launched from now on are counted as.
void count_launches_as(Direction direction);

// Launches that CUDA accepted, of all kernels.
int64_t launches();

struct KernelUse {
  std::string name;
  int64_t h2d = 0;  // launches
  int64_t d2h = 0;
  int64_t d2d = 0;
};

// Every kernel of the program, by name.
std::vector<KernelUse> kernel_uses();

}  // namespace kvkernels::sanitizer
