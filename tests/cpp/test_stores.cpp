// How the CPU's loops store, which the bytes do not show. The destination's second page cannot be written: the
// instruction that tries is looked at where the processor stopped, and so is what was stored before it.
//
//   | page: written | page: read-only |
//               | piece |
//                   ^ the store that is looked at
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/loops.h"
#include "harness.h"

namespace {

using namespace kvkernels;
using namespace kvkernels::testing;

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kPages = 16;

sigjmp_buf stopped;
std::byte instruction[8];

void stop(int, siginfo_t*, void* context) {
#if defined(__x86_64__)
  const auto* const at =
      reinterpret_cast<const std::byte*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  for (int i = 0; i < 8; ++i) instruction[i] = at[i];
#else
  (void)context;
#endif
  siglongjmp(stopped, 1);
}

// movntdq, with the two-byte and three-byte VEX and the EVEX prefix.
bool bypasses_caches() {
  const auto byte = [](int i) { return std::to_integer<int>(instruction[i]); };
  constexpr int kMovntdq = 0xe7;
  return (byte(0) == 0xc5 && byte(2) == kMovntdq) || (byte(0) == 0xc4 && byte(3) == kMovntdq) ||
         (byte(0) == 0x62 && byte(4) == kMovntdq);
}

class HalfReadOnly {
 public:
  HalfReadOnly() {
    void* const memory =
        mmap(nullptr, 2 * kPages * kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("mmap failed");
    middle_ = static_cast<std::byte*>(memory) + kPages * kPageBytes;
    if (mprotect(middle_, kPages * kPageBytes, PROT_READ) != 0) throw std::runtime_error("mprotect failed");
  }
  ~HalfReadOnly() { munmap(middle_ - kPages * kPageBytes, 2 * kPages * kPageBytes); }
  HalfReadOnly(const HalfReadOnly&) = delete;
  HalfReadOnly& operator=(const HalfReadOnly&) = delete;
  std::byte* middle() const { return middle_; }

 private:
  std::byte* middle_;
};

// Whether the store that meets the read-only half bypasses the caches.
template <class Copy>
bool streams(Copy copy) {
  if (sigsetjmp(stopped, 1) == 0) {
    copy();
    throw Failure("nothing was stored to the read-only half");
  }
  return bypasses_caches();
}

void handle_faults(void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action{};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO;
  if (sigaction(SIGSEGV, &action, nullptr) != 0) throw std::runtime_error("sigaction failed");
}

template <class Check>
void for_each_isa(Check check) {
  handle_faults(stop);
  for (const cpu::Isa isa : cpu::kAllIsas) {
    if (cpu::supports(isa)) check(cpu::loops_for(isa), isa, std::string(cpu::name_of(isa)));
  }
}

void pieces_stream_where_asked() {
  const HalfReadOnly dst;
  const std::vector<std::byte> src(kPages * kPageBytes);
  for_each_isa([&](const cpu::Loops& loops, cpu::Isa isa, const std::string& name) {
    for (const int64_t bytes : {64, 128, 192, 256, 512, 1024, 2048, 4096}) {
      for (const int64_t misaligned : {0, 8}) {
        // All to the same place: the first that arrives there is enough.
        std::byte* const to = dst.middle() - bytes / 2 / 64 * 64 - misaligned;
        const std::vector<Fragment> pieces(8, {src.data(), to, bytes});
        for (const bool streaming : {false, true}) {
          const bool seen = streams([&] { loops.copy_pieces(pieces.data(), 8, 8, streaming, cpu::tuning_for(isa)); });
          // Short pieces that begin inside a line would fill it by halves.
          const bool wanted = isa != cpu::Isa::kPortable && streaming && (misaligned == 0 || bytes >= 2048);
          expect(seen == wanted, text(name, ": pieces of ", bytes, ", ", misaligned, " bytes before a line, ",
                                      streaming ? "" : "not ", "streaming"));
        }
      }
    }
  });
}

void strips_stream_where_asked() {
  const HalfReadOnly dst;
  const std::vector<std::byte> src(kPages * kPageBytes);
  for_each_isa([&](const cpu::Loops& loops, cpu::Isa isa, const std::string& name) {
    for (const int64_t bytes : {8, 32, 64, 128, 192, 256}) {
      for (const int64_t misaligned : {0, 8}) {
        const Strip strip{src.data(), dst.middle() - 3 * bytes - misaligned, bytes, 8, bytes, bytes};
        for (const bool streaming : {false, true}) {
          const bool seen = streams([&] { loops.copy_strips(&strip, 1, streaming, cpu::tuning_for(isa)); });
          const bool of_lines = bytes == 64 || bytes == 128 || bytes == 256;
          expect(seen == (isa != cpu::Isa::kPortable && streaming && of_lines && misaligned == 0),
                 text(name, ": strips of ", bytes, ", ", misaligned, " bytes before a line, ", streaming ? "" : "not ",
                      "streaming"));
        }
      }
    }
  });
}

// How many of the other pieces have bytes when the first one cannot be finished.
template <class Copy>
int64_t begun_with_the_first(Copy copy, std::byte* middle, int64_t bytes) {
  constexpr int64_t kPieces = 12;
  const std::vector<std::byte> src(kPages * kPageBytes, std::byte{1});
  std::vector<std::byte> others((kPieces + 1) * kPageBytes);
  std::vector<Fragment> pieces{{src.data(), middle - bytes / 2 / 64 * 64, bytes}};
  for (int64_t i = 1; i < kPieces; ++i) pieces.push_back({src.data(), others.data() + i * kPageBytes, bytes});
  (void)streams([&] { copy(pieces.data(), kPieces); });
  return std::count_if(pieces.begin() + 1, pieces.end(), [bytes](const Fragment& piece) {
    return std::find(piece.dst, piece.dst + bytes, std::byte{1}) != piece.dst + bytes;
  });
}

constexpr int64_t kSizes[] = {512, 1023, 1024, 1984, 2047, 2048, 2049, 4096};

void long_pieces_take_turns() {
  const HalfReadOnly dst;
  for_each_isa([&](const cpu::Loops& loops, cpu::Isa isa, const std::string& name) {
    for (const int interleave : {2, 4}) {
      for (const bool within : {false, true}) {
        const cpu::Tuning tuning{"", isa, false, interleave, 4096, within, true, true, 1024};
        for (const int64_t bytes : kSizes) {
          for (const bool streaming : {false, true}) {
            const int64_t begun = begun_with_the_first(
                [&](const Fragment* pieces, int64_t n) { loops.copy_pieces(pieces, n, n, streaming, tuning); },
                dst.middle(), bytes);
            expect(begun == (bytes < 2048 ? 0 : interleave - 1),
                   text(name, ", ", interleave, " at once, ", bytes, " bytes: ", begun));
          }
        }
      }
    }
  });
}

void pieces_of_rows_take_turns_where_the_table_says_so() {
  const HalfReadOnly dst;
  for_each_isa([&](const cpu::Loops& loops, cpu::Isa isa, const std::string& name) {
    for (const int64_t from_bytes : {1024, 2048, 8192}) {
      for (const int interleave : {2, 4}) {
        const cpu::Tuning tuning{"", isa, false, interleave, 4096, false, true, true, from_bytes};
        for (const int64_t bytes : kSizes) {
          for (const bool streaming : {false, true}) {
            const int64_t begun = begun_with_the_first(
                [&](const Fragment* pieces, int64_t n) { loops.copy_in_order(pieces, n, n, streaming, tuning); },
                dst.middle(), bytes);
            expect(begun == (bytes < from_bytes ? 0 : interleave - 1),
                   text(name, ", ", interleave, " from ", from_bytes, " on, ", bytes, " bytes: ", begun));
          }
        }
      }
    }
  });
}

const Tests kTests{
    {"pieces_stream_where_asked", pieces_stream_where_asked},
    {"strips_stream_where_asked", strips_stream_where_asked},
    {"long_pieces_take_turns", long_pieces_take_turns},
    {"pieces_of_rows_take_turns_where_the_table_says_so", pieces_of_rows_take_turns_where_the_table_says_so},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc > 1 ? argv[1] : "--list"); }
