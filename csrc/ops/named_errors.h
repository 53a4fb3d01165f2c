// Errors of the floors below, and of torch's allocator, get the op's name.
#pragma once

#include <stdexcept>
#include <string>

#include "core/text.h"

namespace kvkernels {

template <class Body>
auto named_errors(const char* op, Body&& body) {
  try {
    return body();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(text(op, ": ", error.what()));
  }
}

}  // namespace kvkernels
