// RMSNorm and its quantization, with one scale per token.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/common/norm.hpp"

namespace liquidgemm {

struct RmsNormArguments {
  void const* x;         // [m, k] without gaps
  void const* residual;  // like x, or null
  Element x_type;        // of x, residual, h and y: kBFloat16, kFloat16 or kFloat32
  void const* weight;    // [k]
  Element weight_type;   // kFloat32 or that of x
  bool weight_is_old;    // not written by the kernel launched right before: it is read ahead of it
  NormMode mode;
  float eps, offset;
  void* h;       // [m, k], x + residual; null if there is none
  void* y;       // [m, k], before it is quantized, or null
  int8_t* out;   // [m, k]
  float* scale;  // [m]
  int64_t m, k;  // m below 2^31, k at most kMaxK
};

// Enqueues h, y and what quantize_activation() makes of y, with the roundings of common/norm.hpp.
//
//
// Returns cudaErrorInvalidValue for other types, otherwise what the launch returns.
cudaError_t rms_norm_quantize(RmsNormArguments const& arguments, cudaStream_t stream);

}  // namespace liquidgemm
