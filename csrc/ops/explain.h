// explain(): between _explain_begin and _explain_end this thread's ops check and lower, and move nothing.
#pragma once

#include <string>

#include "core/lower.h"

namespace kvkernels {

bool explaining();

// What an executor would be handed; `launches` is what it would launch or call.
struct Explanation {
  const char* op;
  Executor executor;
  std::string reason;
  Direction direction;
  std::string shape;
  int64_t launches = 0;
  int64_t descriptors = 0;
  int64_t bytes = 0;
  int64_t pairs = 0;
  int64_t moves = 0;
  int lanes = 1;
  bool streaming = false;
  std::string table{};        // where the numbers are from that were decided by
  std::string device = "{}";  // JSON: what only the CUDA executors say
};

Explanation explanation_of(const char* op, const Work& work, std::string reason);
void record(const Explanation& explanation);

}  // namespace kvkernels
