// Host memory of a size, mapped and nothing more: what is asked of the system is a call each, so that what was got, and
// why not more, can be told.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvkernels {

constexpr int64_t kHugePageBytes = 2 << 20;
constexpr int64_t kMostBytes = int64_t{1} << 46;

enum class Touch {
  kPopulate,  // by the kernel, which keeps what is there; Linux 5.14
  kWrite,     // a zero in each page: of memory that nobody has written to
  kRead,      // of memory that others may write to
};

//   | guard .......... | data: on a huge page's boundary, whole pages | guard .... |
//
// An access past its ends faults, and the kernel cannot merge it with a neighbouring mapping, so that what
// /proc/self/smaps and numa_maps have of it is of it alone.
class HostMemory {
 public:
  // Zeroed memory of its own, or a file's, which other processes may have mapped too; `is_hugetlb` says that it comes,
  // or the file is, from the pages that the administrator set aside. `bytes` from 1 to kMostBytes. Throws
  // std::system_error.
  HostMemory(int64_t bytes, int file, bool is_hugetlb);
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  ~HostMemory();

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  // Up to the end of the last page.
  int64_t mapped_bytes() const { return mapped_bytes_; }

  // Whether the kernel is to put it on huge pages from now on. Throws std::system_error, EINVAL where it has none.
  void advise_huge(bool wanted);

  // Pages that come to be from now on go to this NUMA node, to others where it is full. Throws std::system_error.
  void prefer_node(int node);

  // Has the pages from `begin` to `end`, bytes of it, come to be. Throws std::system_error.
  void touch(int64_t begin, int64_t end, Touch how);

 private:
  int64_t bytes_;
  int64_t mapped_bytes_;
  size_t reserved_bytes_;
  void* reserved_;
  std::byte* data_;
};

}  // namespace kvkernels
