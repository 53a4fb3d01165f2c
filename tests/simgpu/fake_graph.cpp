#include "fake_graph.h"

#include <cuda_runtime_api.h>

#include <utility>

namespace fake {
namespace {

// All nodes that these come after, and they themselves.
std::set<size_t> reached(const std::vector<Node>& nodes, const std::set<size_t>& from) {
  std::set<size_t> found;
  std::vector<size_t> left(from.begin(), from.end());
  while (!left.empty()) {
    const size_t node = left.back();
    left.pop_back();
    if (!found.insert(node).second) continue;
    left.insert(left.end(), nodes[node].after.begin(), nodes[node].after.end());
  }
  return found;
}

}  // namespace

bool is_capturing(const Stream& stream) { return stream.is_declared_capturing || stream.capture != nullptr; }

bool forbids_unsafe_call(int thread_mode) {
  Lock lock(mutex());
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  bool is_forbidden = false;
  for (const Stream* stream : streams()) {
    if (stream->is_declared_capturing) is_forbidden = true;
    if (stream->capture == nullptr) continue;
    Capture& capture = *stream->capture;
    const bool is_own = capture.thread == std::this_thread::get_id();
    const bool meets = is_own
                           ? capture.mode != cudaStreamCaptureModeRelaxed
                           : capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    capture.is_invalid = capture.is_invalid || meets;
    is_forbidden = is_forbidden || meets;
  }
  return is_forbidden;
}

bool forbids_legacy_stream() {
  Lock lock(mutex());
  for (const Stream* stream : streams()) {
    if (stream->is_declared_capturing) return true;
    if (stream->capture != nullptr && stream->is_blocking && stream->device == current_device()) return true;
  }
  return false;
}

int refusal(const Stream& stream) {
  if (stream.is_legacy && forbids_legacy_stream()) return cudaErrorStreamCaptureImplicit;
  return stream.capture != nullptr && stream.capture->is_invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}

int refuse_to_wait(Stream& stream) {
  if (stream.capture != nullptr) stream.capture->is_invalid = true;
  return cudaErrorStreamCaptureUnsupported;
}

int begin_capture(Stream& stream, int mode) {
  Lock lock(mutex());
  if (stream.is_legacy) return cudaErrorStreamCaptureUnsupported;
  if (stream.capture != nullptr) return cudaErrorInvalidValue;
  static uint64_t last_id = 0;
  stream.capture = std::make_shared<Capture>();
  stream.capture->id = ++last_id;
  stream.capture->origin = &stream;
  stream.capture->mode = mode;
  stream.capture->thread = std::this_thread::get_id();
  stream.captured_after.clear();
  return 0;
}

int end_capture(Stream& stream, Graph** graph) {
  Lock lock(mutex());
  const std::shared_ptr<Capture> capture = stream.capture;
  *graph = nullptr;
  if (capture == nullptr) return cudaErrorInvalidValue;
  if (capture->origin != &stream) return cudaErrorStreamCaptureUnmatched;
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
    return cudaErrorStreamCaptureWrongThread;
  }
  const bool is_joined = reached(capture->nodes, stream.captured_after).size() == capture->nodes.size();
  capture->is_active = false;
  for (Stream* other : streams()) {
    if (other->capture == capture) other->capture = nullptr;
  }
  if (capture->is_invalid) return cudaErrorStreamCaptureInvalidated;
  if (!is_joined) return cudaErrorStreamCaptureUnjoined;
  *graph = new Graph{std::move(capture->nodes)};
  return 0;
}

int record(Stream& stream, Work work) {
  // A launch of the graph reads its sources then, whatever memory they are in.
  work.reads = Reads::kInTurn;
  std::vector<Node>& nodes = stream.capture->nodes;
  nodes.push_back({std::move(work), std::move(stream.captured_after)});
  stream.captured_after = {nodes.size() - 1};
  return 0;
}

int wait_in_capture(Stream& stream, const Event& event) {
  if (event.capture == nullptr) return event.is_recorded ? cudaErrorStreamCaptureIsolation : cudaSuccess;
  if (!event.capture->is_active) return cudaErrorCapturedEvent;
  if (stream.is_legacy) return cudaErrorStreamCaptureImplicit;
  if (stream.capture == nullptr) {
    stream.capture = event.capture;
    stream.captured_after = event.captured_after;
    return 0;
  }
  if (stream.capture != event.capture) return cudaErrorStreamCaptureMerge;
  stream.captured_after.insert(event.captured_after.begin(), event.captured_after.end());
  return 0;
}

int launch_graph(GraphExec& graph, Stream& stream) {
  Lock lock(mutex());
  if (stream.capture != nullptr) return cudaErrorNotSupported;
  int64_t begin = 0;
  int first_code = submit(stream, {.kind = "graph begins"}, &begin, {graph.last});
  std::vector<int64_t> ids(graph.nodes.size());
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    std::vector<int64_t> after{begin};
    for (const size_t node : graph.nodes[i].after) after.push_back(ids[node]);
    const int code = submit_beside(stream, graph.nodes[i].work, &ids[i], after);
    if (first_code == 0) first_code = code;
  }
  const int code = submit(stream, {.kind = "graph ends"}, &graph.last, ids);
  return first_code != 0 ? first_code : code;
}

}  // namespace fake
