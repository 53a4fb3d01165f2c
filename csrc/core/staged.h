// How a call's host side lies in a bounded ring on the device, so that small fragments cross the link in long copies.
//
//   host:  | window 0 of id 4 |   | window 0 of id 5 |  ...  | window 1 of id 4 |   | window 1 of id 5 |
//
//   ring:  | window 0, row 0 | row 1 | ... | window 1, row 0 | row 1 | ...
//
// A row is a pair of the chunk that a half of the ring holds, while the other half is filled or emptied; a pair that
// takes more has the whole ring. Rows are in the order of host ids. A window is what one pair touches of the host in
// one place, laid out in the ring as it lies there, gaps included. A kernel moves fragments between the device's pools
// and the ring; the copy engine moves what is touched of each window, and windows that follow each other on both sides
// as one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/lower.h"

namespace kvkernels {

// The ring's bytes. A chunk of half of them takes the fastest links over 50 us, against some 10 for its launches.
constexpr int64_t kStagingRingBytes = 32ll << 20;

// Pieces of host memory that one pair may touch: each is a copy of its own.
constexpr int64_t kStagingMostPieces = 4096;

// Bytes of a window that are touched without a gap.
struct Piece {
  int64_t offset;
  int64_t bytes;
};

struct Window {
  Side host;
  int64_t bytes;
  int64_t row_bytes;    // from a row's window to the next's, in the ring
  int64_t ring_offset;  // where row 0's begins
  std::vector<Piece> pieces;

  // Whether the windows of consecutive ids follow each other on both sides.
  bool merges() const { return pieces.size() == 1 && host.subblocks == 1 && host.block_stride == bytes; }
};

struct HostPair {
  int64_t host;
  int64_t device;
};

struct Staging {
  std::string refusal;  // why the ring cannot serve the call; nothing else is set then
  std::vector<Window> windows;
  struct Place {
    size_t window;
    int64_t offset;  // of the move's first fragment in its window
  };
  std::vector<Place> places;    // by move
  std::vector<HostPair> pairs;  // by host id
  int parts = 2;                // of the ring: its halves, or 1
  int64_t rows = 0;             // of a chunk
  int64_t chunk_bytes = 0;      // of the ring that a chunk takes
  int64_t copies = 0;           // of the copy engine, were the ring endless
  int64_t host_bytes = 0;       // that these move; not the call's where fragments share a source

  int64_t chunks() const { return (static_cast<int64_t>(pairs.size()) + rows - 1) / rows; }
  int64_t mean_copy_bytes() const { return copies > 0 ? host_bytes / copies : 0; }
};

// For work between the host and a device that has something to move, and whose ids are known. Uses `ring_bytes` of the
// ring at most.
Staging plan_staging(const Work& work, int64_t ring_bytes = kStagingRingBytes);

// A chunk: what the kernel moves between the pools and its place in the ring, and what the copy engine moves between
// that and the host.
struct StagingChunk {
  Work in_device;
  std::vector<Fragment> over_link;
};
StagingChunk staging_chunk(const Work& work, const Staging& staging, int64_t chunk, std::byte* place);

}  // namespace kvkernels
