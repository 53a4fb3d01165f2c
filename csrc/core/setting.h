// A value that every thread reads without a lock, and that is seldom replaced.
#pragma once

#include <algorithm>
#include <atomic>
#include <list>
#include <mutex>

namespace kvkernels {

template <class Value>
class Setting {
 public:
  // Null until one was set. It stays as it is for ever: whoever has read it may use it for as long as they like.
  const Value* get() const { return current_.load(std::memory_order_acquire); }

  void set(const Value& value) {
    const std::lock_guard lock(mutex_);
    auto found = std::find(kept_.begin(), kept_.end(), value);
    if (found == kept_.end()) found = kept_.insert(kept_.end(), value);
    current_.store(&*found, std::memory_order_release);
  }

 private:
  std::mutex mutex_;
  std::list<Value> kept_;  // each once, so that values which take turns need no more memory
  std::atomic<const Value*> current_{nullptr};
};

}  // namespace kvkernels
