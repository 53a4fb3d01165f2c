// What the executors kernel and bulk have in common: the same tables and launches.
#pragma once

#include <memory>
#include <string>

#include "ops/executors/room.h"

namespace kvkernels {

std::string kernel_refusal(const Job& job, Site& site);
std::unique_ptr<Plan> kernel_plan(const Job& job, Site& site);

}  // namespace kvkernels
