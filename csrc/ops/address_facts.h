// What raw addresses are: on which device, and which way the bytes go.
#pragma once

#include <string>
#include <vector>

#include "core/lower.h"

namespace kvkernels {

struct AddressFacts {
  int src_device = -1;
  int dst_device = -1;
  bool src_on_device = false;
  bool dst_on_device = false;
  bool src_on_host = false;
  bool dst_on_host = false;
  bool dst_is_read_only = false;   // for the device
  const char* pageable = nullptr;  // the argument with an address of pageable memory
  std::string unreachable;         // why no device's kernel reaches all of them; empty where one may

  Direction direction() const;

  // The destination's device where the source's is another; -1 elsewhere.
  int peer() const { return src_device >= 0 && dst_device >= 0 && src_device != dst_device ? dst_device : -1; }
};

// In the context of the copies' device. ValueError where one side is on two, or two sides on two and one on the host as
// well. Throws CudaError.
AddressFacts facts_of_addresses(const char* op, const std::vector<Fragment>& fragments);

}  // namespace kvkernels
