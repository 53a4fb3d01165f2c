// Arithmetic of floats, for the simulator and, as C++, for the processor: the same source, the same bits.
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#ifdef __CUDACC__
#define BOTH __device__
#else
#define BOTH static inline
#endif

template <class To, class From>
BOTH To bits_as(From value) {
  To to;
  memcpy(&to, &value, sizeof(to));
  return to;
}

// A NaN's bits are the processor's own affair.
BOTH uint32_t bits_of(float x) { return x != x ? 0x7fffffffu : bits_as<uint32_t>(x); }
BOTH uint64_t bits_of(double x) { return x != x ? 0x7fffffffffffffffull : bits_as<uint64_t>(x); }

#ifndef __CUDACC__
// As the device has them: of a number and any NaN the number, and -0 below 0.
template <class Real>
BOTH Real least_of(Real x, Real y) {
  if (x != x || y != y) return x != x ? y : x;
  return x == y ? (std::signbit(x) ? x : y) : (x < y ? x : y);
}
#define fminf least_of
#define fmin least_of
#define fmaxf(x, y) -least_of(-(x), -(y))
#define fmax(x, y) -least_of(-(x), -(y))

// In C++ a number that does not fit is undefined; on the device it is the nearest that does, and NaN is 0.
template <class Whole, class Real>
BOTH Whole clamped(Real x, Whole least, Whole most) {
  if (x != x) return 0;
  if (x <= static_cast<Real>(least)) return least;
  return x >= static_cast<Real>(most) ? most : static_cast<Whole>(x);
}
BOTH int32_t __float2int_rz(float x) { return clamped<int32_t>(x, INT32_MIN, INT32_MAX); }
BOTH int32_t __float2int_rn(float x) { return __float2int_rz(nearbyintf(x)); }
BOTH int32_t __float2int_rd(float x) { return __float2int_rz(floorf(x)); }
BOTH int32_t __float2int_ru(float x) { return __float2int_rz(ceilf(x)); }
BOTH uint32_t __float2uint_rz(float x) { return clamped<uint32_t>(x, 0, UINT32_MAX); }
BOTH int64_t __float2ll_rz(float x) { return clamped<int64_t>(x, INT64_MIN, INT64_MAX); }
BOTH uint64_t __double2ull_rz(double x) { return clamped<uint64_t>(x, 0, UINT64_MAX); }
BOTH int32_t __double2int_rn(double x) { return clamped<int32_t>(nearbyint(x), INT32_MIN, INT32_MAX); }

// The operands are volatile, so that nothing is calculated before the rounding is set.
template <class Calculate>
float towards_zero(Calculate calculate) {
  std::fesetround(FE_TOWARDZERO);
  const volatile float result = calculate();
  std::fesetround(FE_TONEAREST);
  return result;
}
using Operand = const volatile float;
float __fadd_rz(Operand x, Operand y) {
  return towards_zero([&] { return x + y; });
}
float __fsub_rz(Operand x, Operand y) {
  return towards_zero([&] { return x - y; });
}
float __fmul_rz(Operand x, Operand y) {
  return towards_zero([&] { return x * y; });
}
float __fmaf_rz(Operand x, Operand y, Operand z) {
  return towards_zero([&] { return fmaf(x, y, z); });
}
#endif

struct Numbers {
  float x, y, z;
  double u, v;
  uint64_t whole;
};

constexpr int kResults = 52;

BOTH void calculate(const Numbers& n, uint64_t* out) {
  const auto [x, y, z, u, v, whole] = n;
  int at = 0;
  for (const float r : {x + y,
                        x - y,
                        x * y,
                        x / y,
                        sqrtf(x),
                        fmaf(x, y, z),
                        fminf(x, y),
                        fmaxf(x, y),
                        fabsf(x),
                        -x,
                        __fadd_rz(x, y),
                        __fsub_rz(x, y),
                        __fmul_rz(x, y),
                        __fmaf_rz(x, y, z),
                        copysignf(x, y),
                        floorf(x),
                        ceilf(x),
                        truncf(x),
                        rintf(x),
                        roundf(x),
                        static_cast<float>(u),
                        static_cast<float>(static_cast<int32_t>(whole)),
                        static_cast<float>(static_cast<uint32_t>(whole)),
                        static_cast<float>(static_cast<int64_t>(whole)),
                        static_cast<float>(whole)}) {
    out[at++] = bits_of(r);
  }
  for (const double r : {u + v, u - v, u * v, u / v, sqrt(u), fmin(u, v), fmax(u, v), fabs(u), -u, copysign(u, v),
                         floor(u), ceil(u), trunc(u), rint(u), static_cast<double>(x),
                         static_cast<double>(static_cast<int64_t>(whole)), static_cast<double>(whole)}) {
    out[at++] = bits_of(r);
  }
  out[at++] = static_cast<uint32_t>(__float2int_rz(x));
  out[at++] = static_cast<uint32_t>(__float2int_rn(x));
  out[at++] = static_cast<uint32_t>(__float2int_rd(x));
  out[at++] = static_cast<uint32_t>(__float2int_ru(x));
  out[at++] = __float2uint_rz(x);
  out[at++] = static_cast<uint64_t>(__float2ll_rz(x));
  out[at++] = __double2ull_rz(u);
  out[at++] = static_cast<uint32_t>(__double2int_rn(u));
  out[at++] = (x < y) | (x <= y) << 1 | (x == y) << 2 | (x != y) << 3 | (x > y) << 4 | (x >= y) << 5 | (x != x) << 6;
  out[at++] = (u < v) | (u <= v) << 1 | (u == v) << 2 | (u != v) << 3 | (u > v) << 4 | (u >= v) << 5 | !(u < v) << 6;
}

#ifdef __CUDACC__
extern "C" __global__ void floats(const Numbers* in, uint64_t* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  calculate(in[i], out + i * kResults);
}
#else
extern "C" const int results = kResults;
extern "C" void floats(const Numbers* in, uint64_t* out, int count) {
  for (int i = 0; i < count; ++i) calculate(in[i], out + i * kResults);
}
#endif
