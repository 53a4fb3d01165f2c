// Error messages: `<op>: <arg> must <rule>, got <value>`.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace kvkernels {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

// Python sees std::invalid_argument as ValueError and std::out_of_range as IndexError.
template <class... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
  throw std::invalid_argument(text(parts...));
}

template <class... Parts>
[[noreturn]] void index_error(const Parts&... parts) {
  throw std::out_of_range(text(parts...));
}

// "[2, 3]"
template <class Sizes>
std::string list_text(const Sizes& sizes) {
  std::ostringstream out;
  out << '[';
  const char* separator = "";
  for (const auto size : sizes) {
    out << separator << size;
    separator = ", ";
  }
  out << ']';
  return std::move(out).str();
}

// How an error names a tensor: `dst`, or `dst[3]` where it came in a list.
struct Name {
  const char* list;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.list;
  if (name.index >= 0) out << '[' << name.index << ']';
  return out;
}

}  // namespace kvkernels
