// kvkernels._host: what is no op. Knows Python and the core, but not torch.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/loops.h"
#include "host/memory.h"

namespace py = pybind11;

namespace kvkernels {
namespace {

constexpr int64_t kMostThreads = 1024;

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

}  // namespace
}  // namespace kvkernels

PYBIND11_MODULE(_host, module) {
  using namespace kvkernels;
  py::options options;
  options.disable_function_signatures();
  module.doc() = "Host memory and machine facts: what kvkernels needs from C++ that is not an op. Knows no torch.";

  bind_memory(module);

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
}
