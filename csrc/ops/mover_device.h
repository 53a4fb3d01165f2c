// A mover's transfers on CUDA devices. In a build with CUDA code in mover_device.cpp, in one without in
// cuda_absent.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/job.h"
#include "transfer/item.h"

namespace kvkernels {

class MoverDevices {
 public:
  virtual ~MoverDevices() = default;

  // A job that an op has checked, for later: chooses its executor. Throws where a mover cannot carry it out.
  virtual void take(Job& job) = 0;

  // The transfer that they are, behind the work that the current streams were asked for so far, and behind `events`
  // (cudaEvent_t, recorded). Throws std::runtime_error.
  virtual std::shared_ptr<transfer::Item> item_of(std::vector<Job> jobs, const std::vector<void*>& events) = 0;

  // What the stream is asked for from now on comes after the marks.
  virtual void block(int device, void* stream, const transfer::Marks& marks) = 0;

  // Gives back the streams, when every transfer has ended.
  virtual void close() = 0;
};

// For tensors on `device`, or on any where it is negative.
std::shared_ptr<MoverDevices> mover_devices(int device, int64_t chunk_bytes);

}  // namespace kvkernels
