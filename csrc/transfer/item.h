// A transfer as the queue sees it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "transfer/device.h"
#include "transfer/footprint.h"
#include "transfer/payload.h"

namespace kvkernels::transfer {

enum class State : int64_t { kQueued, kRunning, kDone, kFailed, kCancelled };

// One side of one of its copies; the segments are the payload's.
struct Access {
  std::shared_ptr<const BoundCopy> copy;
  const std::vector<Segment>* segments;
  bool is_written;
  std::shared_ptr<const Footprint> footprint = nullptr;  // the queue's
  std::optional<BlockSet> blocks = std::nullopt;         // made when they are first compared

  const BlockSet& block_set() {
    if (!blocks) blocks.emplace(*segments, is_written, footprint->subblocks);
    return *blocks;
  }
};

struct Item;

// Who comes after a transfer. One that reads what it writes, or was told to, fails where it does.
struct Follower {
  std::shared_ptr<Item> item;
  bool fails_with_it;
};

struct Item {
  int64_t ticket = 0;
  Priority priority = Priority::kLoad;
  Priority urgency = Priority::kLoad;  // that of the most urgent one that waits for it, where that is more
  Direction direction = Direction::kHostToHost;
  Executor executor = Executor::kCpu;
  State state = State::kQueued;
  int64_t bytes = 0;
  int64_t chunks = 1;
  int64_t next_chunk = 0;   // to be handed out
  int64_t chunks_left = 1;  // to be copied
  bool is_aborted = false;  // the chunks that were left when the queue was closed were not copied
  std::unique_ptr<Payload> payload;
  std::vector<Access> accesses;

  int64_t waits_for = 0;
  std::vector<std::weak_ptr<Item>> before;
  std::vector<Follower> followers;

  // On a device: every chunk was handed over, so that others can be ordered behind it there.
  bool is_handed_over = false;
  bool has_moved = false;          // bytes of it may be on their way
  Marks marks;                     // behind its chunks, the last of each stream
  Marks after;                     // what its streams wait for
  std::vector<Follower> leans_on;  // those before it that had not ended when it was released

  int64_t end_order = 0;
  int64_t submitted_ns = 0;
  int64_t started_ns = 0;
  int64_t ended_ns = 0;
  Kind kind = Kind::kNone;
  std::string error;
  int waiters = 0;
  std::condition_variable has_ended_cv;

  bool has_ended() const { return state >= State::kDone; }
};

}  // namespace kvkernels::transfer
