#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kvkernels::cpu {

namespace {

std::string supported_names() {
  std::string names;
  for (const Isa isa : kAllIsas) {
    if (!supports(isa)) continue;
    if (!names.empty()) names += ", ";
    names += "'" + std::string(name_of(isa)) + "'";
  }
  return names;
}

Isa select() {
  const char* const wanted = std::getenv("KVKERNELS_CPU_ISA");
  Isa widest = Isa::kPortable;
  for (const Isa isa : kAllIsas) {
    if (!supports(isa)) continue;
    if (wanted != nullptr && wanted == name_of(isa)) return isa;
    widest = isa;
  }
  if (wanted == nullptr) return widest;
  throw std::invalid_argument("KVKERNELS_CPU_ISA must be one of " + supported_names() + " on this processor, got '" +
                              wanted + "'");
}

}  // namespace

std::string_view name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      break;
  }
  return "portable";
}

bool supports(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2");
    case Isa::kPortable:
      break;
  }
#endif
  return isa == Isa::kPortable;
}

Isa selected_isa() {
  static const Isa isa = select();
  return isa;
}

}  // namespace kvkernels::cpu
