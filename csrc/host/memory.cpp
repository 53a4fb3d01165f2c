#include "host/memory.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "host/host_memory.h"

namespace py = pybind11;

namespace kvkernels {
namespace {

[[noreturn]] void raise_memory_error(const std::string& message) {
  PyErr_SetString(PyExc_MemoryError, message.c_str());
  throw py::error_already_set();
}

void raise_os_error(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const std::system_error& error) {
    PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
  }
}

void check_bytes(const char* what, int64_t bytes) {
  if (bytes <= 0)
    throw std::invalid_argument(std::string(what) + ": bytes must be positive, got " + std::to_string(bytes));
  if (bytes > kMostBytes) {
    raise_memory_error(std::string(what) + ": bytes must be at most 2^46, got " + std::to_string(bytes));
  }
}

// What Python holds: the memory, and what is to be undone while it is still mapped.
struct PyMemory {
  PyMemory(int64_t bytes, int file, bool is_hugetlb) : memory(bytes, file, is_hugetlb) {}

  HostMemory memory;
  py::object before_unmap = py::none();
};

struct Release {
  void operator()(PyMemory* held) const {
    {
      const py::error_scope keeps_pending_error;
      const py::object before_unmap = std::exchange(held->before_unmap, py::object());
      try {
        if (!before_unmap.is_none()) before_unmap();
      } catch (py::error_already_set& error) {
        error.discard_as_unraisable("kvkernels._host.HostMemory");
      }
    }
    // To unmap what is large takes seconds, which other threads need not wait for. Nothing of Python's is left in it.
    const py::gil_scoped_release release;
    delete held;
  }
};
using Holder = std::unique_ptr<PyMemory, Release>;

Holder host_memory(int64_t bytes, int file, bool hugetlb) {
  check_bytes("HostMemory", bytes);
  return Holder(new PyMemory(bytes, file, hugetlb));
}

Holder huge_pages(int64_t bytes) {
  check_bytes("huge_pages", bytes);
  try {
    Holder held(new PyMemory(bytes, -1, false));
    try {
      held->memory.advise_huge(true);
    } catch (const std::system_error& error) {
      // This kernel has no transparent huge pages: the memory is as good, and huge_page_bytes tells.
      if (error.code().value() != EINVAL) throw;
    }
    const py::gil_scoped_release release;
    held->memory.touch(0, bytes, Touch::kWrite);
    return held;
  } catch (const std::system_error& error) {
    raise_memory_error(std::string("huge_pages: ") + error.what());
  }
}

Touch touch_of(const std::string& how) {
  if (how == "populate") return Touch::kPopulate;
  if (how == "write") return Touch::kWrite;
  if (how == "read") return Touch::kRead;
  throw std::invalid_argument("HostMemory: how must be one of 'populate', 'write', 'read', got '" + how + "'");
}

void touch(PyMemory& self, int64_t begin, int64_t end, const std::string& how) {
  const Touch touch = touch_of(how);
  if (begin < 0 || begin > end || end > self.memory.bytes()) {
    throw std::invalid_argument("HostMemory: begin and end must be inside of its " +
                                std::to_string(self.memory.bytes()) + " bytes, got " + std::to_string(begin) + " and " +
                                std::to_string(end));
  }
  const py::gil_scoped_release release;
  self.memory.touch(begin, end, touch);
}

void prefer_node(PyMemory& self, int node) {
  // As many as Linux can be built for.
  if (node < 0 || node >= 1024) {
    throw std::invalid_argument("HostMemory: node must be from 0 to 1023, got " + std::to_string(node));
  }
  self.memory.prefer_node(node);
}

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
      if (range.begin >= end) break;  // they are in order, and each costs a walk over its pages
      const uintptr_t low = std::max(range.begin, begin);
      const uintptr_t high = std::min(range.end, end);
      overlap = low < high ? static_cast<int64_t>(high - low) : 0;
    } else if (overlap > 0) {
      total += std::min(huge_bytes_of(line), overlap);
    }
  }
  return total;
}

}  // namespace

void bind_memory(py::module_& module) {
  py::register_local_exception_translator(&raise_os_error);

  py::class_<PyMemory, Holder>(module, "HostMemory", py::buffer_protocol(),
                               R"(HostMemory(bytes: int, file: int = -1, hugetlb: bool = False)

Host memory of a size: a writable one-dimensional buffer of unsigned bytes, unmapped with the last object that uses it.

Parameters
----------
bytes : int
    From 1 to 2**46. What is mapped ends with the last page; an access before its start, or past that, faults.
file : int
    A file's descriptor, whose first bytes it is, shared with whoever else maps them; -1 for zeroed memory of its own.
hugetlb : bool
    From the huge pages of 2 MiB that the administrator set aside; a file must be of such pages then.

Raises
------
ValueError
    If `bytes` is not positive.
MemoryError
    If `bytes` is above 2**46.
OSError
    If the system refuses.

Notes
-----
It starts on a 2 MiB boundary. No page exists before it is touched.)")
      .def(py::init(&host_memory), py::arg("bytes"), py::arg("file") = -1, py::arg("hugetlb") = false)
      .def_buffer([](PyMemory& self) {
        return py::buffer_info(self.memory.data(), 1, py::format_descriptor<uint8_t>::format(), 1,
                               {self.memory.bytes()}, {1});
      })
      .def("__len__", [](const PyMemory& self) { return self.memory.bytes(); })
      .def("__repr__",
           [](const PyMemory& self) {
             return "<kvkernels._host.HostMemory of " + std::to_string(self.memory.bytes()) + " bytes>";
           })
      .def_property_readonly(
          "address", [](const PyMemory& self) { return reinterpret_cast<uintptr_t>(self.memory.data()); },
          "int: where it starts.")
      .def_property_readonly(
          "mapped_bytes", [](const PyMemory& self) { return self.memory.mapped_bytes(); },
          "int: up to the end of its last page.")
      .def_readwrite("before_unmap", &PyMemory::before_unmap,
                     "callable or None: called without arguments just before it is unmapped.")
      .def(
          "advise_huge", [](PyMemory& self, bool wanted) { self.memory.advise_huge(wanted); }, py::arg("wanted"),
          R"(advise_huge(wanted: bool) -> None

Say whether pages that come to be from now on are to be huge ones.

Raises
------
OSError
    If the system refuses; EINVAL where it has no huge pages.)")
      .def("prefer_node", &prefer_node, py::arg("node"), R"(prefer_node(node: int) -> None

Have pages that come to be from now on on a NUMA node, and on others only where that is full.

Raises
------
ValueError
    If `node` is not from 0 to 1023.
OSError
    If the system refuses; EINVAL where it has no such node.)")
      .def("touch", &touch, py::arg("begin"), py::arg("end"), py::arg("how"),
           R"(touch(begin: int, end: int, how: str) -> None

Have the pages of a range come to be. Runs without the GIL, and several threads may call it at once.

Parameters
----------
begin, end : int
    Bytes of it.
how : str
    "populate" leaves it to the kernel, which keeps what is there; "write" puts a zero into each page, which is for memory
    that nobody has written to; "read" looks at each, which does nothing for memory of its own.

Raises
------
ValueError
    If an argument is out of its range.
OSError
    If the system has no page to give; EINVAL where it does not know how to populate, before Linux 5.14.)");

  module.def("huge_pages", &huge_pages, py::arg("bytes"),
             R"(huge_pages(bytes: int) -> HostMemory

Allocate zeroed host memory on 2 MiB huge pages, where the system gives them.

Parameters
----------
bytes : int
    How many, at least 1. The memory starts on a 2 MiB boundary and is touched before this returns.

Returns
-------
HostMemory
    A writable buffer of uint8, for ``torch.frombuffer(pages, dtype=torch.uint8)`` or ``numpy.frombuffer(pages, "u1")``.
    What is past its last whole huge page is on small ones.

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
    `HostMemory`, a numpy array, the ``numpy()`` of a CPU tensor, ...

Returns
-------
int
    Exact, up to the rounding of the last page, for `HostMemory`. Elsewhere an upper bound: the system counts a
    mapping as a whole, and a buffer may share one with other memory.

Raises
------
RuntimeError
    If /proc/self/smaps cannot be read.)");
}

}  // namespace kvkernels
