// The executors' names, and the choice of one.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace kvkernels {

enum class Executor {
  kAuto,
#define KVKERNELS_EXECUTOR(constant, name) constant,
#include "core/executors.inc"
#undef KVKERNELS_EXECUTOR
};

inline constexpr std::array kExecutors{
#define KVKERNELS_EXECUTOR(constant, name) Executor::constant,
#include "core/executors.inc"
#undef KVKERNELS_EXECUTOR
};

constexpr std::string_view name_of(Executor executor) {
  switch (executor) {
    case Executor::kAuto:
      return "auto";
#define KVKERNELS_EXECUTOR(constant, name) \
  case Executor::constant:                 \
    return #name;
#include "core/executors.inc"
#undef KVKERNELS_EXECUTOR
  }
  return "";
}

// Which executor serves a call, and why.
struct Choice {
  Executor executor;
  std::string reason;
  int64_t sm_budget = 0;  // for a call that names none
};

}  // namespace kvkernels
