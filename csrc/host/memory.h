// What kvkernels._host has of host memory.
#pragma once

#include <pybind11/pybind11.h>

namespace kvkernels {

void bind_memory(pybind11::module_& module);

}  // namespace kvkernels
