// Which instructions the CPU loops use.
#pragma once

#include <string_view>

namespace kvkernels::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

constexpr Isa kAllIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};

std::string_view name_of(Isa isa);

// Whether this build holds loops for it and this processor (and its operating system) runs them.
bool supports(Isa isa);

// The widest supported one, or what KVKERNELS_CPU_ISA=avx512|avx2|portable says. Read once; throws
// std::invalid_argument, at each call, on a value that is unknown or not supported here.
Isa selected_isa();

}  // namespace kvkernels::cpu
