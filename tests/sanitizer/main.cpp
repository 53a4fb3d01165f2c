// Small copies by every kernel of csrc/cuda in every direction, for compute-sanitizer: no torch, no Python, every
// allocation as large as what is in it, and every byte of both sides compared with what a plain loop makes of them.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "launches.h"
#include "session.h"

using namespace kvkernels::sanitizer;

namespace {

constexpr const char* kUsage = R"(usage: kvkernels_sanitizer [--list] [--plant byte|gap|source|bounds] [GROUP...]

Runs the groups that are named, or all. Exit status: 0 where all bytes are right and every kernel was launched in every
direction, 1 where not, 2 where nothing could be run.

  --list   the groups, and the kernels that this program holds
  --plant  makes a mistake on purpose: changes a byte of the destination that is copied, one after a page, or one of the
           source, of each case; or does nothing but read past the end of a pool on the device
)";

struct Options {
  bool lists = false;
  bool reads_out_of_bounds = false;
  Plant plant = Plant::kNone;
  std::vector<std::string> wanted;
  std::string problem;
};

Options read_options(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const std::string value = i + 1 < count ? arguments[i + 1] : "";
    if (argument == "--list") {
      options.lists = true;
    } else if (argument == "--plant") {
      options.reads_out_of_bounds = value == "bounds";
      options.plant = value == "byte"     ? Plant::kByte
                      : value == "gap"    ? Plant::kGap
                      : value == "source" ? Plant::kSource
                                          : Plant::kNone;
      if (options.plant == Plant::kNone && !options.reads_out_of_bounds) {
        options.problem = "--plant must be byte, gap, source or bounds, got '" + value + "'";
      }
      ++i;
    } else {
      const bool is_known =
          std::any_of(groups().begin(), groups().end(), [&](const Group& group) { return argument == group.name; });
      if (!is_known) options.problem = "GROUP must be one that --list names, got '" + argument + "'";
      options.wanted.push_back(argument);
    }
  }
  return options;
}

void list() {
  for (const Group& group : groups()) std::printf("group %s\n", group.name);
  for (const KernelUse& use : kernel_uses()) std::printf("kernel %s\n", use.name.c_str());
}

void run_groups(Session& session, const Options& options) {
  for (const Group& group : groups()) {
    const auto& wanted = options.wanted;
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), group.name) == wanted.end()) continue;
    if (group.needs_bulk && !session.bulk_refusal().empty()) {
      std::printf("%-12s not run: %s\n", group.name, session.bulk_refusal().c_str());
      continue;
    }
    const int64_t cases = session.cases();
    const int64_t launched = launches();
    const int64_t wrong_bytes = session.wrong_bytes();
    try {
      group.run(session);
    } catch (...) {
      std::printf("%-12s broke off after %lld cases\n", group.name, static_cast<long long>(session.cases() - cases));
      throw;
    }
    std::printf("%-12s %3lld cases, %3lld launches, %lld wrong bytes\n", group.name,
                static_cast<long long>(session.cases() - cases), static_cast<long long>(launches() - launched),
                static_cast<long long>(session.wrong_bytes() - wrong_bytes));
    std::fflush(stdout);
  }
}

// Names what was not launched; how many that are. Kernels of the executor bulk count only where it serves.
int64_t count_missing(const Session& session) {
  int64_t missing = 0;
  for (const KernelUse& use : kernel_uses()) {
    if (use.name.find("_bulk_") != std::string::npos && !session.bulk_refusal().empty()) continue;
    const std::pair<const char*, int64_t> directions[] = {{"h2d", use.h2d}, {"d2h", use.d2h}, {"d2d", use.d2d}};
    for (const auto& [direction, count] : directions) {
      if (count > 0) continue;
      ++missing;
      std::printf("NOT LAUNCHED %s, %s\n", use.name.c_str(), direction);
    }
  }
  return missing;
}

int run(const Options& options) {
  Session session(options.plant);
  if (options.reads_out_of_bounds) {
    read_out_of_bounds(session);
    std::printf("a page past the end of a pool was read, and nothing stopped it\n");
    return 1;
  }
  run_groups(session, options);
  const int64_t missing = count_missing(session);
  const std::vector<KernelUse> uses = kernel_uses();
  const auto launched =
      std::count_if(uses.begin(), uses.end(), [](const KernelUse& use) { return use.h2d + use.d2h + use.d2d > 0; });
  std::printf("%lld cases, %lld kernels, %lld wrong bytes\n", static_cast<long long>(session.cases()),
              static_cast<long long>(launched), static_cast<long long>(session.wrong_bytes()));
  return session.wrong_cases() > 0 || missing > 0 || uses.empty() ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) {
  const Options options = read_options(count, arguments);
  if (!options.problem.empty()) {
    std::fprintf(stderr, "kvkernels_sanitizer: %s\n%s", options.problem.c_str(), kUsage);
    return 2;
  }
  if (options.lists) {
    list();
    return 0;
  }
  int devices = 0;
  const cudaError_t code = cudaGetDeviceCount(&devices);
  if (code != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "kvkernels_sanitizer: there is no CUDA device: %s\n", cudaGetErrorString(code));
    return 2;
  }
  try {
    return run(options);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "kvkernels_sanitizer: %s\n", error.what());
    return 1;
  }
}
