// Transfers that a device carries out: a chunk is handed to one of its streams, and has ended once a mark behind it was
// passed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transfer/payload.h"

namespace kvkernels::transfer {

// So many chunks of a direction are on their way at most, of which none is less urgent than the one that would be next:
// while one is copied the next is there already, and no more than these are in front of something urgent.
constexpr int64_t kMostInFlight = 2;

struct Times {
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
};

// A point in a stream, behind a chunk.
class Mark {
 public:
  virtual ~Mark() = default;

  // The stream's number: what is behind another mark of it is passed later.
  virtual int64_t stream() const = 0;

  // Throws std::runtime_error where the device says an error.
  virtual bool has_passed() = 0;

  // What `stream`, one of the device's, is asked for from now on comes after it. Throws std::runtime_error.
  virtual void hold(void* stream) = 0;

  // When its chunk was carried out, where the device says it; else as they are.
  virtual void tell(Times& times) noexcept = 0;
};

using Marks = std::vector<std::shared_ptr<Mark>>;

// What became of a chunk that was to be handed over.
struct Handed {
  std::shared_ptr<Mark> mark;  // null where nothing of it is on its way
  Kind kind = Kind::kNone;     // and `error`: why not all of it was handed over
  std::string error;
  bool has_moved = false;  // bytes of it may have been written
};

class DevicePayload : public Payload {
 public:
  // In a stream of this urgency, behind `after`. From one thread.
  virtual Handed hand_over(int64_t chunk, Priority urgency, const Marks& after) noexcept = 0;
};

}  // namespace kvkernels::transfer
