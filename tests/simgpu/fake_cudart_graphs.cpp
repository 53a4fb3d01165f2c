// libcudart.so.13 of the stand-in: capture of streams, and graphs.
#include <set>

#include "fake.h"
#include "fake_cudart.h"
#include "fake_graph.h"
#include "fake_time.h"

using fake::done;
using fake::Graph;
using fake::GraphExec;
using fake::Lock;
using fake::Stream;

namespace {

std::set<Graph*>& graphs() {
  static auto* const instance = new std::set<Graph*>;
  return *instance;
}

std::set<GraphExec*>& executables() {
  static auto* const instance = new std::set<GraphExec*>;
  return *instance;
}

template <class Object, class Handle>
Object* find_in(const std::set<Object*>& objects, Handle handle) {
  const auto found = objects.find(reinterpret_cast<Object*>(handle));
  return found == objects.end() ? nullptr : *found;
}

template <class Object, class Handle>
cudaError_t destroy(const char* call, std::set<Object*>& objects, Handle handle) {
  Lock lock(fake::mutex());
  const int code = fake::enter(call);
  Object* const found = find_in(objects, handle);
  if (found == nullptr) return done(cudaErrorInvalidValue);
  objects.erase(found);
  delete found;
  return done(code);
}

// The status, and the id where the stream captures. The legacy stream has no status while another's capture forbids it.
cudaError_t status_of(const char* call, cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter(call)) return done(code);
  const Stream* const stream = fake::find_stream(handle);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (stream->is_legacy && fake::forbids_legacy_stream()) return done(cudaErrorStreamCaptureImplicit);
  const bool is_invalid = stream->capture != nullptr && stream->capture->is_invalid;
  *status = is_invalid                    ? cudaStreamCaptureStatusInvalidated
            : fake::is_capturing(*stream) ? cudaStreamCaptureStatusActive
                                          : cudaStreamCaptureStatusNone;
  if (id != nullptr && stream->capture != nullptr) *id = stream->capture->id;
  return done(0);
}

}  // namespace

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return status_of("cudaStreamIsCapturing", stream, status, nullptr);
}

// The graph and its nodes are not shown before the capture ends.
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                            size_t* dependency_count) {
  if (graph != nullptr) *graph = nullptr;
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (dependency_count != nullptr) *dependency_count = 0;
  return status_of("cudaStreamGetCaptureInfo", stream, status, id);
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaStreamBeginCapture")) return done(code);
  Stream* const stream = fake::find_stream(handle);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  return done(fake::begin_capture(*stream, mode));
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaStreamEndCapture")) return done(code);
  Stream* const stream = fake::find_stream(handle);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  Graph* graph = nullptr;
  const int code = fake::end_capture(*stream, &graph);
  if (graph != nullptr) graphs().insert(graph);
  *out = reinterpret_cast<cudaGraph_t>(graph);
  return done(code);
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t* nodes, size_t* count) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaGraphGetNodes")) return done(code);
  const Graph* const graph = find_in(graphs(), handle);
  if (graph == nullptr) return done(cudaErrorInvalidValue);
  if (nodes != nullptr) return done(cudaErrorNotSupported);
  *count = graph->nodes.size();
  return done(0);
}

EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t handle, unsigned long long) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaGraphInstantiate")) return done(code);
  const Graph* const graph = find_in(graphs(), handle);
  if (graph == nullptr) return done(cudaErrorInvalidValue);
  *out = reinterpret_cast<cudaGraphExec_t>(*executables().insert(new GraphExec{graph->nodes, 0}).first);
  return done(0);
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(out, graph, flags);
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream_handle) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaGraphLaunch")) return done(code);
  GraphExec* const graph = find_in(executables(), handle);
  Stream* const stream = fake::find_stream(stream_handle);
  if (graph == nullptr) return done(cudaErrorInvalidValue);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (const int code = fake::refusal(*stream)) return done(code);
  return done(fake::launch_graph(*graph, *stream));
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return destroy("cudaGraphDestroy", graphs(), graph); }

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return destroy("cudaGraphExecDestroy", executables(), graph);
}
