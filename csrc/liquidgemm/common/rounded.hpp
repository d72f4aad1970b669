// Separately rounded fp32 operations: the same bits on host and device, but for payloads of NaNs.
//
// On the device they are intrinsics that the compiler does not fuse. On the host, what is compiled
// for a processor with FMA needs -ffp-contract=off, which setup.py gives to liquidgemm/cpu.
// Everything is in an anonymous namespace and without the standard library, so that files that are
// compiled for different instruction sets keep copies of their own (see cpu/simd.hpp).
#pragma once

#include <cstdint>

#include <cute/config.hpp>

namespace liquidgemm::rounded {
namespace {

CUTE_HOST_DEVICE uint32_t float_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

CUTE_HOST_DEVICE float float_from(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

CUTE_HOST_DEVICE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

CUTE_HOST_DEVICE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// a * b + c where the product is exact, so that one rounding is what two are.
CUTE_HOST_DEVICE float add_exact_product(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

CUTE_HOST_DEVICE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

CUTE_HOST_DEVICE float square_root(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

}  // namespace
}  // namespace liquidgemm::rounded
