#include "cpu/loops.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvkernels::cpu {

#if defined(__x86_64__)

namespace avx512 {

#define KVKERNELS_TARGET __attribute__((target("avx512f,avx512vl")))
using Vector = __m512i;
KVKERNELS_TARGET inline Vector load(const std::byte* src) { return _mm512_loadu_si512(src); }
KVKERNELS_TARGET inline void store(std::byte* dst, Vector value) { _mm512_storeu_si512(dst, value); }
KVKERNELS_TARGET inline void stream(std::byte* dst, Vector value) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), value);
}
void fence() { _mm_sfence(); }
constexpr Isa kIsa = Isa::kAvx512;
constexpr bool kStreams = true;
#include "cpu/loops.inc"
#undef KVKERNELS_TARGET

}  // namespace avx512

namespace avx2 {

#define KVKERNELS_TARGET __attribute__((target("avx2")))
using Vector = __m256i;
KVKERNELS_TARGET inline Vector load(const std::byte* src) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
}
KVKERNELS_TARGET inline void store(std::byte* dst, Vector value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), value);
}
KVKERNELS_TARGET inline void stream(std::byte* dst, Vector value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), value);
}
void fence() { _mm_sfence(); }
constexpr Isa kIsa = Isa::kAvx2;
constexpr bool kStreams = true;
#include "cpu/loops.inc"
#undef KVKERNELS_TARGET

}  // namespace avx2

#endif

namespace portable {

#define KVKERNELS_TARGET
struct Vector {
  uint64_t words[2];
};
inline Vector load(const std::byte* src) {
  Vector value;
  std::memcpy(&value, src, sizeof(value));
  return value;
}
inline void store(std::byte* dst, Vector value) { std::memcpy(dst, &value, sizeof(value)); }
inline void stream(std::byte* dst, Vector value) { store(dst, value); }
void fence() {}
constexpr Isa kIsa = Isa::kPortable;
constexpr bool kStreams = false;
#include "cpu/loops.inc"
#undef KVKERNELS_TARGET

}  // namespace portable

const Loops& loops_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::kLoops;
  if (isa == Isa::kAvx2) return avx2::kLoops;
#endif
  (void)isa;
  return portable::kLoops;
}

const char* instruction_set() { return name_of(loops_for(selected_isa()).isa).data(); }

}  // namespace kvkernels::cpu
