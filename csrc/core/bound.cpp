#include "core/bound.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace kvkernels {
namespace {

struct Span {
  uintptr_t begin;
  uintptr_t end;
  bool written;
};

void append_spans(const std::vector<Pool>& pools, bool written, std::vector<Span>& spans) {
  for (const Pool& pool : pools) {
    if (pool.blocks == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(pool.base);
    spans.push_back(
        {begin, begin + static_cast<uintptr_t>((pool.blocks - 1) * pool.block_stride + pool.page_bytes), written});
  }
}

bool are_apart(const BoundCopy& copy) {
  std::vector<Span> spans;
  spans.reserve(copy.src.size() + copy.dst.size());
  append_spans(copy.src, false, spans);
  append_spans(copy.dst, true, spans);
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  uintptr_t read_until = 0;  // by the spans before
  uintptr_t written_until = 0;
  for (const Span& span : spans) {
    if (span.begin < written_until || (span.written && span.begin < read_until)) return false;
    uintptr_t& until = span.written ? written_until : read_until;
    until = std::max(until, span.end);
  }
  return true;
}

template <class Row>
bool are_equal(const std::vector<Row>& a, const std::vector<Row>& b) {
  static_assert(std::has_unique_object_representations_v<Row>, "rows are compared byte by byte");
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Row)) == 0);
}

bool has_content(const BoundCopy& copy, const BoundCopy& content) {
  return copy.src_subblocks == content.src_subblocks && copy.dst_subblocks == content.dst_subblocks &&
         copy.direction == content.direction && are_equal(copy.src, content.src) && are_equal(copy.dst, content.dst) &&
         are_equal(copy.runs, content.runs);
}

}  // namespace

void bind(BoundCopy& copy) {
  copy.moves = bind_runs(copy.runs, copy.src, copy.dst, copy.src_subblocks, copy.dst_subblocks, copy.direction);
  copy.sums = sums_of(copy.moves);
  copy.is_apart = are_apart(copy);
}

std::shared_ptr<const BoundCopy> BoundCopies::find(const BoundCopy& content) {
  const std::lock_guard lock(mutex_);
  const auto found =
      std::find_if(copies_.begin(), copies_.end(), [&](const auto& copy) { return has_content(*copy, content); });
  if (found == copies_.end()) return nullptr;
  std::rotate(copies_.begin(), found, found + 1);
  return copies_.front();
}

void BoundCopies::add(std::shared_ptr<const BoundCopy> copy) {
  const std::lock_guard lock(mutex_);
  if (copies_.size() == kMost) copies_.pop_back();
  copies_.insert(copies_.begin(), std::move(copy));
}

}  // namespace kvkernels
