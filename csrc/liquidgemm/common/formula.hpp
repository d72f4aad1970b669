// The epilogue's arithmetic, in one place:
//
//   y[m, n] = float(sum) * x_scale[m] * weight_scale[n] (+ bias[n])
//
// in fp32, rounded after each operation, left to right; then to the type of y.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include <cute/config.hpp>

#include "liquidgemm/common/element.hpp"

namespace liquidgemm {

CUTE_DEVICE float scaled(int32_t sum, float token_scale, float scale, float bias) {
  return __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(sum), token_scale), scale), bias);
}

CUTE_DEVICE float load_as_float(void const* base, Element type, int i) {
  switch (type) {
    case Element::kBFloat16:
      return __bfloat162float(static_cast<__nv_bfloat16 const*>(base)[i]);
    case Element::kFloat16:
      return __half2float(static_cast<__half const*>(base)[i]);
    default:
      return static_cast<float const*>(base)[i];
  }
}

CUTE_DEVICE uint32_t round_pair(float low, float high, __nv_bfloat162) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t const&>(pair);
}
CUTE_DEVICE uint32_t round_pair(float low, float high, __half2) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<uint32_t const&>(pair);
}

}  // namespace liquidgemm
