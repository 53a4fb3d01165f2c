#include "host/host_memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>
#include <vector>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace kvkernels {
namespace {

int64_t rounded_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

[[noreturn]] void fail(const char* call, int64_t bytes, int error = errno) {
  throw std::system_error(error, std::system_category(), std::string(call) + " of " + std::to_string(bytes) + " bytes");
}

}  // namespace

HostMemory::HostMemory(int64_t bytes, int file, bool is_hugetlb)
    : bytes_(bytes), mapped_bytes_(rounded_up(bytes, is_hugetlb ? kHugePageBytes : sysconf(_SC_PAGESIZE))) {
  const auto mapped = static_cast<size_t>(mapped_bytes_);
  int flags = file >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  // The size by its power of two: the system's default may be another.
  if (is_hugetlb && file < 0) flags |= MAP_HUGETLB | 21 << MAP_HUGE_SHIFT;
  // Tried where nothing is: a refusal below may leave a hole in the reservation, which another thread's memory can
  // fill.
  void* const tried = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, flags, file, 0);
  if (tried == MAP_FAILED) fail("mmap", bytes);
  munmap(tried, mapped);

  reserved_bytes_ = mapped + 2 * kHugePageBytes;
  reserved_ = mmap(nullptr, reserved_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved_ == MAP_FAILED) fail("mmap", bytes);
  // A huge page or more after the start, so that a small page or more on either side stays unreadable.
  auto* const start = static_cast<std::byte*>(reserved_);
  const auto address = reinterpret_cast<uintptr_t>(start);
  data_ = reinterpret_cast<std::byte*>((address + 2 * kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes);
  if (mmap(data_, mapped, PROT_READ | PROT_WRITE, flags | MAP_FIXED, file, 0) == MAP_FAILED) {
    const int error = errno;
    munmap(start, static_cast<size_t>(data_ - start));
    munmap(data_ + mapped, static_cast<size_t>(start + reserved_bytes_ - (data_ + mapped)));
    fail("mmap", bytes, error);
  }
}

HostMemory::~HostMemory() {
  // Cannot fail for a mapping of our own, and a destructor has no one to tell.
  munmap(reserved_, reserved_bytes_);
}

void HostMemory::advise_huge(bool wanted) {
  const int advice = wanted ? MADV_HUGEPAGE : MADV_NOHUGEPAGE;
  if (madvise(data_, static_cast<size_t>(mapped_bytes_), advice) != 0) fail("madvise", bytes_);
}

void HostMemory::prefer_node(int node) {
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> nodes(static_cast<size_t>(node) / kBits + 1);
  nodes.back() = 1UL << static_cast<size_t>(node) % kBits;
  // One bit more than there are: the kernel takes one off.
  if (syscall(SYS_mbind, data_, static_cast<size_t>(mapped_bytes_), MPOL_PREFERRED, nodes.data(),
              nodes.size() * kBits + 1, 0) != 0) {
    fail("mbind", bytes_);
  }
}

void HostMemory::touch(int64_t begin, int64_t end, Touch how) {
  const int64_t small_page = sysconf(_SC_PAGESIZE);
  begin = begin / small_page * small_page;
  if (how == Touch::kPopulate) {
    const auto length = static_cast<size_t>(end - begin);
    if (madvise(data_ + begin, length, MADV_POPULATE_WRITE) != 0) fail("madvise(MADV_POPULATE_WRITE)", end - begin);
    return;
  }
  for (int64_t i = begin; i < end; i += small_page) {
    auto& first = *reinterpret_cast<volatile std::byte*>(data_ + i);
    if (how == Touch::kWrite) {
      first = std::byte{0};
    } else {
      const std::byte seen = first;
      (void)seen;
    }
  }
}

}  // namespace kvkernels
