#include "ops/fork.h"

#include <dirent.h>
#include <pthread.h>

#include <atomic>

namespace kvkernels {
namespace {

thread_local bool had_threads_before_fork = false;  // the child has the thread that forked
std::atomic<bool> lost{false};

bool has_several_threads() {
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return true;  // better slow than stuck
  int entries = 0;
  while (readdir(tasks) != nullptr) ++entries;
  closedir(tasks);
  return entries > 3;  // this thread, "." and ".."
}

// A child of a child has lost what its parent had lost, however many threads that one had.
const int registered = pthread_atfork([] { had_threads_before_fork = has_several_threads(); }, nullptr,
                                      [] {
                                        if (had_threads_before_fork) lost = true;
                                      });

}  // namespace

bool lost_threads_to_fork() { return registered != 0 || lost; }

}  // namespace kvkernels
