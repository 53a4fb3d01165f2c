#include "ops/explain.h"

#include <utility>

#include "ops/json.h"
#include "ops/stable_abi.h"

namespace kvkernels {
namespace {

thread_local bool scope_is_open = false;
thread_local std::string recorded;

}  // namespace

bool explaining() { return scope_is_open; }

Explanation explanation_of(const char* op, const Work& work, std::string reason) {
  Explanation explanation{op, work.executor, std::move(reason), work.direction, std::string(name_of(work.shape))};
  explanation.descriptors = work.descriptors;
  explanation.bytes = work.bytes;
  explanation.pairs = work.pairs;
  explanation.moves = static_cast<int64_t>(work.fragments.empty() ? work.moves.size() : 1);
  explanation.lanes = work.lanes;
  explanation.streaming = work.streaming;
  return explanation;
}

void record(const Explanation& e) {
  recorded =
      text("{\"op\": ", quoted(e.op), ", \"executor\": ", quoted(name_of(e.executor)),
           ", \"reason\": ", quoted(e.reason), ", \"direction\": ", quoted(name_of(e.direction)),
           ", \"shape\": ", quoted(e.shape), ", \"launches\": ", e.launches, ", \"descriptors\": ", e.descriptors,
           ", \"bytes\": ", e.bytes, ", \"pairs\": ", e.pairs, ", \"moves\": ", e.moves, ", \"lanes\": ", e.lanes,
           ", \"streaming\": ", e.streaming ? "true" : "false", ", \"table\": ", quoted(e.table),
           ", \"device\": ", e.device, '}');
}

void explain_begin() {
  scope_is_open = true;
  recorded = "{}";
}

std::string explain_end() {
  scope_is_open = false;
  return std::exchange(recorded, {});
}

}  // namespace kvkernels
