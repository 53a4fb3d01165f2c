// Capture of streams into graphs, which can be launched again and again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "fake_time.h"

#pragma GCC visibility push(default)
namespace fake {

struct Node {
  Work work;
  std::set<size_t> after;  // other nodes of the graph, all before this one in it
};

struct Capture {
  uint64_t id = 0;
  const Stream* origin = nullptr;
  int mode = 0;
  std::thread::id thread;
  bool is_active = true;
  bool is_invalid = false;
  std::vector<Node> nodes;
};

struct Graph {
  std::vector<Node> nodes;
};

struct GraphExec {
  std::vector<Node> nodes;
  int64_t last = 0;  // the end of its last launch
};

bool is_capturing(const Stream& stream);

// Whether a thread in that capture mode may not make a call that no capture would see; captures that meet one are void.
bool forbids_unsafe_call(int thread_mode);

// Whether using the legacy stream would wait for a stream that captures.
bool forbids_legacy_stream();

// The error of work asked for in the stream while it, or for the legacy stream any other, captures in a way that
// forbids that.
int refusal(const Stream& stream);

// The error of waiting for a stream that captures, which is void then.
int refuse_to_wait(Stream& stream);

int begin_capture(Stream& stream, int mode);
int end_capture(Stream& stream, Graph** graph);

// Adds work to the capture of the stream.
int record(Stream& stream, Work work);

// Brings what the event has captured into the stream, which thereby captures too; or says why that cannot be.
int wait_in_capture(Stream& stream, const Event& event);

int launch_graph(GraphExec& graph, Stream& stream);

}  // namespace fake
#pragma GCC visibility pop
