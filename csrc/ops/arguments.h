// Argument checks that the ops share: pools, ids, devices, executors. Each raises before anything moves.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "core/lower.h"
#include "core/plan.h"
#include "core/text.h"
#include "ops/stable_abi.h"

namespace kvkernels {

// Where a list of tensors lies: the host, or one CUDA device.
struct Place {
  bool on_device = false;
  int device = -1;
};

// Strided, on a supported device, with memory behind it.
TensorFacts checked_tensor(const char* op, const Name& name, const Tensor& tensor);

// The tensor as a pool: dimension 0 is the block, the rest its page, whose bytes must lie together.
Pool checked_pool(const char* op, const Name& name, const Tensor& tensor, const TensorFacts& facts, bool written);

struct Pools {
  std::vector<Pool> pools;
  Place place;
  std::span<const Tensor> tensors;  // the op's own arguments, in the same order
};

// A list of pools on one device; `written` ones are opened for writing.
Pools checked_pools(const char* op, const char* list, const std::vector<Tensor>& tensors, bool written);

// Opening a destination gives a copy-on-write storage memory of its own, which moves the sources that are views of it:
// their addresses are read after every destination is open.
void reread_addresses(Pools& pools, const std::vector<Tensor>& tensors);

// `place` grows to hold one more tensor, or raises.
void merge_place(const char* op, const char* list, const TensorFacts& facts, bool first, Place& place);

// ValueError where two CUDA devices meet.
void check_one_device(const char* op, const Place& a, const Place& b);

struct Ids {
  IdColumn columns[2];
  int64_t rows = 0;
  bool on_device = false;
  int device = -1;
};

// int32 or int64 of shape [n, columns] (or [n] for one column), any strides.
Ids checked_ids(const char* op, const char* argument, const Tensor& tensor, int columns);

// ValueError where ids lie on a device that no pool is on, or not on the source's where the pools are on two.
void check_ids_device(const char* op, const char* argument, const Ids& ids, const Place& src, const Place& dst);

Executor checked_executor(const char* op, std::string_view executor);
void check_sm_budget(const char* op, int64_t sm_budget);

}  // namespace kvkernels
