// The tables by which calls are carried out, as Python hands them over and reads them: kvkernels/policy.
#pragma once

#include <string>

#include "core/executor.h"
#include "ops/stable_abi.h"

namespace kvkernels {

// int64 of shape [rows, 11] on the CPU: a row's members in PolicyRow's order, -1 for those that are not there, and
// executors, directions, links and copies by their number. It serves from then on, under the name `source`.
void set_policy(const Tensor& rows, StrArgument source);

// The rows that serve, or those that are compiled in, as a JSON list of objects.
std::string policy_json(bool is_default);

// int64 of shape [10] on the CPU, in the order of kCpuNumbers, -1 for what is this machine's own. They serve from then
// on; `source` is what explain() calls the table, "" where all of it is this machine's.
void set_cpu_numbers(const Tensor& numbers, StrArgument source);

// The numbers that serve, as a JSON object, and where they are from.
std::string cpu_numbers_json();

// Where what decides on such a call is from.
std::string table_of(Executor executor);

}  // namespace kvkernels
