// kvkernels._host: what is no op. Knows Python and the core, but not torch.
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "core/policy.h"
#include "cpu/isa.h"
#include "cpu/loops.h"

namespace py = pybind11;

namespace kvkernels {
namespace {

constexpr int64_t kHugePageBytes = 2 << 20;
constexpr int64_t kMostBytes = int64_t{1} << 46;
constexpr int64_t kMostThreads = 1024;

[[noreturn]] void raise_memory_error(const std::string& message) {
  PyErr_SetString(PyExc_MemoryError, message.c_str());
  throw py::error_already_set();
}

// Zeroed memory on 2 MiB boundaries, between guard pages: an access past its ends faults, and the kernel cannot merge
// it with a neighbouring mapping, so that /proc/self/smaps tells its huge pages apart.
class HugePages {
 public:
  explicit HugePages(int64_t bytes) : bytes_(bytes) {
    if (bytes <= 0) throw std::invalid_argument("huge_pages: bytes must be positive, got " + std::to_string(bytes));
    if (bytes > kMostBytes) raise_memory_error("huge_pages: bytes must be at most 2^46, got " + std::to_string(bytes));
    const int64_t rounded = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    mapped_bytes_ = static_cast<size_t>(rounded + 2 * kHugePageBytes);
    mapping_ = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) fail("mmap");
    const auto address = reinterpret_cast<uintptr_t>(mapping_);
    // A huge page or more after the mapping's start, so that a small page or more on either side stays unreadable.
    data_ = reinterpret_cast<std::byte*>((address + 2 * kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes);
    if (mprotect(data_, static_cast<size_t>(rounded), PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    // EINVAL says that this kernel has no transparent huge pages: the memory is as good, and huge_page_bytes tells.
    if (madvise(data_, static_cast<size_t>(rounded), MADV_HUGEPAGE) != 0 && errno != EINVAL) fail("madvise");
    const int64_t small_page = sysconf(_SC_PAGESIZE);
    const py::gil_scoped_release release;
    for (int64_t i = 0; i < rounded; i += small_page) {
      *reinterpret_cast<volatile std::byte*>(data_ + i) = std::byte{0};
    }
  }
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;
  ~HugePages() { unmap(); }

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void unmap() {
    // Cannot fail for a mapping of our own, and a destructor has no one to tell.
    if (mapping_ != MAP_FAILED) munmap(mapping_, mapped_bytes_);
    mapping_ = MAP_FAILED;
  }

  [[noreturn]] void fail(const char* call) {
    const std::string why = std::strerror(errno);
    unmap();
    raise_memory_error("huge_pages: " + std::string(call) + " of " + std::to_string(bytes_) + " bytes failed: " + why);
  }

  int64_t bytes_;
  size_t mapped_bytes_ = 0;
  void* mapping_ = MAP_FAILED;
  std::byte* data_ = nullptr;
};

struct Range {
  uintptr_t begin;
  uintptr_t end;
};

// "7f0000000000-7f0000200000 rw-p ..." in /proc/self/smaps; begin == end for the lines of another kind.
Range mapping_of(std::string_view line) {
  Range range{0, 0};
  const char* const end = line.data() + line.size();
  const auto [dash, first_error] = std::from_chars(line.data(), end, range.begin, 16);
  if (first_error != std::errc() || dash == end || *dash != '-') return {0, 0};
  const auto [rest, second_error] = std::from_chars(dash + 1, end, range.end, 16);
  return second_error == std::errc() && rest != end && *rest == ' ' ? range : Range{0, 0};
}

// "AnonHugePages:     2048 kB", of a kind that counts memory on huge pages; 0 for other lines.
int64_t huge_bytes_of(std::string_view line) {
  constexpr std::string_view kKinds[] = {
      "AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:", "Shared_Hugetlb:", "Private_Hugetlb:"};
  for (const std::string_view kind : kKinds) {
    if (!line.starts_with(kind)) continue;
    line.remove_prefix(std::min(line.find_first_of("0123456789"), line.size()));
    int64_t kib = 0;
    const auto [stop, error] = std::from_chars(line.data(), line.data() + line.size(), kib);
    (void)stop;
    return error == std::errc() ? kib << 10 : 0;
  }
  return 0;
}

int64_t huge_page_bytes(const py::buffer& buffer) {
  const py::buffer_info info = buffer.request();
  const auto begin = reinterpret_cast<uintptr_t>(info.ptr);
  const uintptr_t end = begin + static_cast<uintptr_t>(info.size * info.itemsize);
  std::ifstream smaps("/proc/self/smaps");
  if (!smaps) throw std::runtime_error("huge_page_bytes: /proc/self/smaps cannot be read");
  int64_t total = 0;
  int64_t overlap = 0;
  for (std::string line; std::getline(smaps, line);) {
    if (const Range range = mapping_of(line); range.begin != range.end) {
      const uintptr_t low = std::max(range.begin, begin);
      const uintptr_t high = std::min(range.end, end);
      overlap = low < high ? static_cast<int64_t>(high - low) : 0;
    } else if (overlap > 0) {
      total += std::min(huge_bytes_of(line), overlap);
    }
  }
  return total;
}

cpu::Ceiling ceiling_of(const std::string& loop) {
  if (loop == "one stream") return cpu::Ceiling::kOneStream;
  if (loop == "two pages") return cpu::Ceiling::kTwoPages;
  if (loop == "two halves") return cpu::Ceiling::kTwoHalves;
  throw std::invalid_argument("stream_copy: loop must be one of 'one stream', 'two pages', 'two halves', got '" + loop +
                              "'");
}

void stream_copy(uint64_t dst_address, uint64_t src_address, int64_t bytes, int64_t threads, const std::string& loop) {
  const cpu::Ceiling ceiling = ceiling_of(loop);
  if (dst_address == 0) throw std::invalid_argument("stream_copy: dst_address must not be null, got 0");
  if (src_address == 0) throw std::invalid_argument("stream_copy: src_address must not be null, got 0");
  if (bytes <= 0) throw std::invalid_argument("stream_copy: bytes must be positive, got " + std::to_string(bytes));
  if (threads < 1 || threads > kMostThreads) {
    throw std::invalid_argument("stream_copy: threads must be from 1 to 1024, got " + std::to_string(threads));
  }
  const auto length = static_cast<uint64_t>(bytes);
  if (dst_address + length < length || src_address + length < length) {
    throw std::invalid_argument("stream_copy: bytes must fit in the address space, got an overflow");
  }
  if (dst_address < src_address + length && src_address < dst_address + length) {
    throw std::invalid_argument(
        "stream_copy: src_address must not overlap what is written, got ranges that share bytes");
  }
  const cpu::Loops& loops = cpu::loops_for(cpu::selected_isa());
  auto* const dst = reinterpret_cast<std::byte*>(dst_address);
  const auto* const src = reinterpret_cast<const std::byte*>(src_address);
  // Whole pairs of pages each, so that a cut leaves "two pages" nothing to do one by one.
  const int64_t part = (bytes / threads + 2 * cpu::kPieceBytes - 1) / (2 * cpu::kPieceBytes) * (2 * cpu::kPieceBytes);
  const auto run = [&](int64_t thread) {
    const int64_t begin = std::min(thread * part, bytes);
    const int64_t end = thread == threads - 1 ? bytes : std::min(begin + part, bytes);
    if (begin < end) loops.ceiling(dst + begin, src + begin, end - begin, ceiling);
  };
  const py::gil_scoped_release release;
  std::vector<std::jthread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
}

py::dict policy_dict() {
  const CpuPolicy& policy = cpu_policy();
  py::dict result;
  result["l2_bytes"] = policy.l2_bytes;
  result["l3_bytes"] = policy.l3_bytes;
  result["stream_pool_bytes"] = policy.stream_pool_bytes;
  result["stream_soon_read_bytes"] = policy.stream_soon_read_bytes;
  result["serial_bytes"] = policy.serial_bytes;
  result["lane_bytes"] = policy.lane_bytes;
  result["sort_min_page_bytes"] = policy.sort_min_page_bytes;
  result["sort_max_page_bytes"] = policy.sort_max_page_bytes;
  result["sort_bytes"] = policy.sort_bytes;
  return result;
}

}  // namespace
}  // namespace kvkernels

PYBIND11_MODULE(_host, module) {
  using namespace kvkernels;
  py::options options;
  options.disable_function_signatures();
  module.doc() = "Host memory and machine facts: what kvkernels needs from C++ that is not an op. Knows no torch.";

  py::class_<HugePages>(module, "HugePages", py::buffer_protocol(), R"(Memory that huge_pages() gave.

A writable one-dimensional buffer of unsigned bytes; freed with the last object that uses it.)")
      .def_buffer([](HugePages& self) {
        return py::buffer_info(self.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {self.bytes()}, {1});
      })
      .def("__len__", &HugePages::bytes)
      .def("__repr__", [](const HugePages& self) {
        return "<kvkernels._host.HugePages of " + std::to_string(self.bytes()) + " bytes>";
      });

  module.def(
      "huge_pages", [](int64_t bytes) { return std::make_unique<HugePages>(bytes); }, py::arg("bytes"),
      R"(huge_pages(bytes: int) -> HugePages

Allocate zeroed host memory on 2 MiB huge pages, where the system gives them.

Parameters
----------
bytes : int
    How many, at least 1. The memory starts on a 2 MiB boundary and is touched before this returns.

Returns
-------
HugePages
    A writable buffer of uint8, for ``torch.frombuffer(pages, dtype=torch.uint8)`` or ``numpy.frombuffer(pages, "u1")``.
    An access before its start, or past its end rounded up to 2 MiB, faults.

Raises
------
ValueError
    If `bytes` is not positive.
MemoryError
    If the system refuses the memory.

Notes
-----
Whether the pages really are huge is the system's choice; `huge_page_bytes` tells.)");

  module.def("huge_page_bytes", &huge_page_bytes, py::arg("buffer"),
             R"(huge_page_bytes(buffer: object) -> int

Count the bytes of a buffer that sit on huge pages, by /proc/self/smaps.

Parameters
----------
buffer : object with the buffer protocol
    `HugePages`, a numpy array, the ``numpy()`` of a CPU tensor, ...

Returns
-------
int
    Exact, up to the rounding of the last huge page, for `HugePages`. Elsewhere an upper bound: the system counts a
    mapping as a whole, and a buffer may share one with other memory.

Raises
------
RuntimeError
    If /proc/self/smaps cannot be read.)");

  module.def("stream_copy", &stream_copy, py::arg("dst_address"), py::arg("src_address"), py::arg("bytes"),
             py::arg("threads"), py::arg("loop"),
             R"(stream_copy(dst_address: int, src_address: int, bytes: int, threads: int, loop: str) -> None

Copy contiguous host memory with streaming stores: the ceiling that the benchmarks compare with.

Parameters
----------
dst_address, src_address : int
    Where the bytes go and come from, as ``tensor.data_ptr()`` gives it. Nobody checks that the memory is there.
bytes : int
    How many, at least 1.
threads : int
    Between how many threads the range is split, from 1 to 1024. They are started anew for each call.
loop : str
    "one stream" walks each part from its start; "two pages" takes two neighbouring 4 KiB pages in turns of 128 bytes,
    "two halves" the two halves of each part.

Raises
------
ValueError
    If an argument is out of its range, or the two ranges share bytes.

Notes
-----
The stores are those of `instruction_set`; its portable path has ordinary ones. Runs without the GIL.)");

  module.def("instruction_set", &cpu::instruction_set,
             R"(instruction_set() -> str

Say which instructions the CPU executor uses: "avx512", "avx2" or "portable".

Raises
------
ValueError
    If KVKERNELS_CPU_ISA, which replaces the choice, names one that is unknown or not supported here.)");

  module.def("cpu_policy", &policy_dict,
             R"(cpu_policy() -> dict[str, int]

Give the sizes, in bytes, by which the CPU executor decides.

Returns
-------
dict
    "l2_bytes" and "l3_bytes", the caches as found; "stream_pool_bytes" and "stream_soon_read_bytes", from which calls
    bypass the caches; "serial_bytes", below which a call runs on one thread; "lane_bytes", the least for each thread;
    "sort_min_page_bytes", "sort_max_page_bytes" and "sort_bytes", the pages and calls that are sorted by source.

Raises
------
ValueError
    If KVKERNELS_STREAM_BYTES, which replaces both streaming sizes, is not a number of bytes.)");
}
