#include "core/gpu_policy.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "core/text.h"

namespace kvkernels {
namespace {

constexpr int64_t kKiB = 1024;
constexpr int64_t kMiB = 1024 * kKiB;

// None of it was measured by this project, which had no GPU; docs/design.md names what was published.
//
// Batched copies move 4 to 7 GB/s up to 16 KiB a fragment, 28 to 44 at 28 KiB and 39 to 52 at 64 KiB on an H100, and
// below 16 fragments a kernel's launch costs more than they do. To the device 128 KiB extrapolates these figures, on
// the kernel's side, to where batched copies have the whole link, but for counts as large as theirs, where 28 KiB is
// their own answer. The first measurement replaces both.
//
// One by one a copy costs about 3.4 us besides its bytes, and copy engines pass the kernel between 1 and 2 MiB.
//
// A kernel's stores to the host are the slower of its two ways, so a ring, whose copies over the link are as long as
// those that the copy engine would be left, goes before the kernel there; to the device it serves where none can load.
GpuPolicy published() {
  const auto inside = [](Executor executor) {
    PolicyRow row{executor};
    row.direction = Direction::kDeviceToDevice;
    return row;
  };
  const auto over_link = [](Executor executor, Direction direction, Copies copies, int64_t count_at_least,
                            int64_t fragment_bytes_below) {
    PolicyRow row{executor};
    row.direction = direction;
    row.copies = copies;
    row.count_at_least = count_at_least;
    row.fragment_bytes_below = fragment_bytes_below;
    if (executor == Executor::kStaged) row.ring_copy_bytes_at_least = fragment_bytes_below;
    return row;
  };
  constexpr Direction kIn = Direction::kHostToDevice;
  constexpr Direction kOut = Direction::kDeviceToHost;
  constexpr int64_t kMany = 50'000;
  PolicyRow few_in = over_link(Executor::kKernel, kIn, Copies::kBatched, 16, 128 * kKiB);
  few_in.count_below = kMany;
  return {{inside(Executor::kKernel), inside(Executor::kTriton), few_in,
           over_link(Executor::kKernel, kIn, Copies::kBatched, kMany, 28 * kKiB),
           over_link(Executor::kStaged, kIn, Copies::kBatched, 16, 28 * kKiB),
           over_link(Executor::kStaged, kOut, Copies::kBatched, 16, 28 * kKiB),
           over_link(Executor::kKernel, kOut, Copies::kBatched, 16, 28 * kKiB),
           over_link(Executor::kKernel, kIn, Copies::kOneByOne, 4, kMiB),
           over_link(Executor::kStaged, kIn, Copies::kOneByOne, 4, kMiB),
           over_link(Executor::kStaged, kOut, Copies::kOneByOne, 4, kMiB),
           over_link(Executor::kKernel, kOut, Copies::kOneByOne, 4, kMiB)},
          "the default policy"};
}

struct InForce {
  std::mutex mutex;
  std::shared_ptr<const GpuPolicy> policy = std::make_shared<const GpuPolicy>(default_gpu_policy());
};

InForce& in_force() {
  static InForce state;
  return state;
}

std::optional<int64_t> override_bytes() {
  const char* value = std::getenv("KVKERNELS_KERNEL_BELOW_BYTES");
  if (value == nullptr) return std::nullopt;
  char* end = nullptr;
  errno = 0;
  const long long bytes = std::strtoll(value, &end, 10);
  if (end == value || *end != '\0' || bytes < 0 || errno == ERANGE) {
    value_error("KVKERNELS_KERNEL_BELOW_BYTES must be a number of bytes, got '", value, "'");
  }
  return bytes;
}

// The limits in bytes that a row has.
void replace_bytes(int64_t bytes, PolicyRow& row) {
  if (row.direction == Direction::kDeviceToDevice) return;
  if (row.fragment_bytes_below) row.fragment_bytes_below = bytes;
  if (row.ring_copy_bytes_at_least) row.ring_copy_bytes_at_least = bytes;
}

template <class Number>
bool is_within(Number number, std::optional<Number> at_least, std::optional<Number> below) {
  return (!at_least || number >= *at_least) && (!below || number < *below);
}

template <class Value>
bool is_asked_for(Value value, std::optional<Value> wanted) {
  return !wanted || *wanted == value;
}

int64_t mean_bytes(const GpuCall& call) { return call.bytes / std::max<int64_t>(call.count, 1); }

bool fits(const PolicyRow& row, const GpuCall& call) {
  return is_asked_for(call.direction, row.direction) && is_asked_for(call.link, row.link) &&
         is_asked_for(call.copies, row.copies) &&
         is_within(call.capability, row.capability_at_least, row.capability_below) &&
         is_within(call.count, row.count_at_least, row.count_below) &&
         is_within(mean_bytes(call), {}, row.fragment_bytes_below);
}

std::string words_of(const GpuCall& call) {
  const char* where = " inside the device";
  const bool is_batched = call.copies == Copies::kBatched;
  if (call.direction == Direction::kHostToDevice) where = " to the device";
  if (call.direction == Direction::kDeviceToHost) where = " to the host";
  std::string words = text(call.count, " fragments of ", mean_bytes(call), " bytes on average", where);
  if (call.direction == Direction::kDeviceToDevice) return words;
  return words + (is_batched ? ", where copies are batched" : ", where copies go one by one");
}

// The limits that the call is inside of.
std::string limits_of(const PolicyRow& row) {
  std::string limits;
  const auto add = [&](const auto&... parts) { limits += text(limits.empty() ? " (" : ", ", parts...); };
  const auto version = [](int capability) { return text(capability / 10, '.', capability % 10); };
  if (row.link) add(*row.link == Link::kCoherent ? "a coherent link" : "a link that is not coherent");
  if (row.capability_at_least) add("compute capability ", version(*row.capability_at_least), " or later");
  if (row.capability_below) add("compute capability before ", version(*row.capability_below));
  if (row.count_at_least) add("at least ", *row.count_at_least, " of them");
  if (row.count_below) add("fewer than ", *row.count_below, " of them");
  if (row.fragment_bytes_below) add("below ", *row.fragment_bytes_below, " bytes");
  if (row.ring_copy_bytes_at_least) {
    add("by way of the ring in copies of at least ", *row.ring_copy_bytes_at_least, " bytes");
  }
  return limits.empty() ? limits : limits + ')';
}

int64_t shortest_fragment(const std::vector<Move>& moves) {
  const auto shorter = [](const Move& a, const Move& b) { return a.fragment_bytes < b.fragment_bytes; };
  return moves.empty() ? 0 : std::min_element(moves.begin(), moves.end(), shorter)->fragment_bytes;
}

// Asks each executor once, and keeps why those that refused did.
class Asked {
 public:
  Asked(const GpuAnswers& answers, bool keeps_words) : answers_(answers), keeps_words_(keeps_words) {}

  bool serves(Executor executor) {
    const auto found = std::find(refused_.begin(), refused_.end(), executor);
    if (found != refused_.end()) return false;
    const std::string refusal = answers_.refusal(executor);
    if (refusal.empty()) return true;
    refused_.push_back(executor);
    if (keeps_words_) refusals_ += text("; ", name_of(executor), " cannot: ", refusal);
    return false;
  }

  const std::string& refusals() const { return refusals_; }

 private:
  const GpuAnswers& answers_;
  const bool keeps_words_;
  std::vector<Executor> refused_;
  std::string refusals_;
};

}  // namespace

std::string_view name_of(Link link) { return link == Link::kPcie ? "pcie" : "coherent"; }
std::string_view name_of(Copies copies) { return copies == Copies::kBatched ? "batched" : "one_by_one"; }

const GpuPolicy& default_gpu_policy() {
  static const GpuPolicy policy = published();
  return policy;
}

std::shared_ptr<const GpuPolicy> gpu_policy() {
  InForce& state = in_force();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return state.policy;
}

void set_gpu_policy(GpuPolicy policy) {
  auto next = std::make_shared<const GpuPolicy>(std::move(policy));
  InForce& state = in_force();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.policy = std::move(next);
}

std::optional<Choice> choose_on_gpu(const GpuPolicy& policy, const GpuCall& call, const GpuAnswers& answers,
                                    bool wants_reason) {
  const std::optional<int64_t> replaced = override_bytes();
  const auto policy_name = [&] { return policy.source + (replaced ? " with KVKERNELS_KERNEL_BELOW_BYTES" : ""); };
  Asked asked(answers, wants_reason);
  for (size_t i = 0; i < policy.rows.size(); ++i) {
    PolicyRow row = policy.rows[i];
    if (replaced) replace_bytes(*replaced, row);
    if (!fits(row, call) || !asked.serves(row.executor)) continue;
    if (row.ring_copy_bytes_at_least && answers.ring_copy_bytes() < *row.ring_copy_bytes_at_least) continue;
    Choice choice{row.executor, "", row.sm_budget.value_or(0)};
    if (wants_reason) {
      choice.reason = text(words_of(call), ": ", name_of(row.executor), " by rows[", i, "] of ", policy_name(),
                           limits_of(row), asked.refusals());
    }
    return choice;
  }
  for (const Executor executor : {Executor::kDma, Executor::kKernel, Executor::kTriton}) {
    if (!asked.serves(executor)) continue;
    if (!wants_reason) return Choice{executor, ""};
    return Choice{executor, text(words_of(call), ": ", name_of(executor), " because no row of ", policy_name(),
                                 " serves them", asked.refusals())};
  }
  return std::nullopt;
}

std::string bulk_refusal(const std::vector<Move>& moves, const BulkFacts& facts) {
  const auto version = [](int capability) { return text(capability / 10, '.', capability % 10); };
  if (facts.capability < kBulkCapability) {
    return text("it needs compute capability 9.0 or later, and the device has ", version(facts.capability));
  }
  if (facts.code_capability < kBulkCapability) {
    return text("it needs code for compute capability 9.0 or later, and the library's for this device is for ",
                version(facts.code_capability));
  }
  if (facts.shared_bytes < facts.needed_bytes) {
    return text("it needs ", facts.needed_bytes, " bytes of shared memory a CTA, and the device has ",
                facts.shared_bytes);
  }
  const int64_t shortest = shortest_fragment(moves);
  if (shortest >= kBulkMinBytes) return "";
  return text("its fragments must have at least ", kBulkMinBytes, " bytes, and one has ", shortest);
}

}  // namespace kvkernels
