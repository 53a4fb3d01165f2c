// libcuda.so.1 of the stand-in: the refusal of what it lacks.
#include <cuda.h>

#include <cstdio>
#include <set>

#include "fake.h"

namespace {
thread_local std::string refusal_text;
}

int fake::refuse_call(const char* call) {
  Lock lock(mutex());
  static auto* const said = new std::set<std::string>;
  refusal_text = std::string("the stand-in for CUDA lacks ") + call;
  if (said->insert(call).second) std::fprintf(stderr, "%s\n", refusal_text.c_str());
  log(call, {{"refused", 1}});
  return CUDA_ERROR_NOT_SUPPORTED;
}

const std::string& fake::last_refusal() { return refusal_text; }
