// Copies by the copy engines: batched where the stream and the memory allow it, one by one otherwise.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/fragments.h"
#include "core/issued.h"
#include "core/lower.h"
#include "cuda/pointers.h"

namespace kvkernels {

// Descriptors of one batched call. A call costs some microseconds and a descriptor about half of one, so at 2,048 the
// call itself is below 1%; a batch of 51,828 is known to have crashed a driver, and another vendor's stops at 8,192.
constexpr int64_t kBatchDescriptors = 2048;

// Copies everything in `work`, or `count` fragments, in the stream's order; neither synchronises except where CUDA does
// for pageable memory. Fragments are cut where a host registration ends. `any_source_order` lets a batch of pinned host
// to device copies read its sources before earlier work on the stream is done; any other batch ignores it. Never
// batched: on a capturing stream, on the legacy default stream, pageable or managed memory, without the driver's
// function. Throws CudaError.
Issued dma_copy(const Work& work, bool any_source_order, cudaStream_t stream);
Issued dma_copy(const Fragment* fragments, int64_t count, bool any_source_order, cudaStream_t stream);

// What dma_copy will issue, as long as the driver does not refuse a batch.
Issued plan_dma(const Work& work, cudaStream_t stream);
Issued plan_dma(const Fragment* fragments, int64_t count, cudaStream_t stream);

// The same on a stream and with a ring on the device that need not be there yet.
Issued plan_ring_copies(const Fragment* fragments, int64_t count, const Range& ring);

}  // namespace kvkernels
