// What a transfer copies, and what keeps its memory alive.
#pragma once

#include <cstdint>

namespace kvkernels::transfer {

enum class Priority : int64_t {
  kAwaited = -1,  // an urgency alone: a stream waits for it
  kExpedited,
  kLoad,
  kStore
};

// What Python raises it as.
enum class Kind : int64_t { kNone, kValueError, kRuntimeError, kDependency, kCancelled };

class Payload {
 public:
  virtual ~Payload() = default;
  virtual void check() = 0;  // before the first chunk; throws where the memory is not what it was
};

// That the queue's threads copy.
class HostPayload : public Payload {
 public:
  virtual void copy(int64_t chunk) noexcept = 0;  // from any thread, several at once
  virtual void finish() noexcept = 0;             // every chunk was copied
};

}  // namespace kvkernels::transfer
