// The GPU policy as Python hands it over and reads it: kvkernels/policy.py.
#pragma once

#include <string>

#include "ops/stable_abi.h"

namespace kvkernels {

// int64 of shape [rows, 10] on the CPU: a row's members in PolicyRow's order, -1 for those that are not there, and
// executors, directions, links and copies by their number. It serves from then on.
void set_policy(const Tensor& rows);

// The rows that serve, or those that are compiled in, as a JSON list of objects.
std::string policy_json(bool is_default);

}  // namespace kvkernels
