// Threads that a fork has taken away from a process.
#pragma once

namespace kvkernels {

// Whether this process is the child of one that had several threads when it was forked: OpenMP believes that its
// threads are still there and would wait for them for ever.
bool lost_threads_to_fork();

}  // namespace kvkernels
