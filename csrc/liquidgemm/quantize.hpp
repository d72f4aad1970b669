// Activations to int8, with one scale per token.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "liquidgemm/common/element.hpp"

namespace liquidgemm {

struct QuantizeArguments {
  void const* x;       // [m, k] without gaps
  Element x_type;      // kBFloat16, kFloat16 or kFloat32
  int8_t* out;         // [m, k]
  int64_t out_stride;  // bytes between rows
  float* scale;        // [m]
  int64_t m, k;        // m below 2^31
};

// Enqueues scale = max |x| / 127 and out = round(x / scale) of every row. A row with a NaN or an
// infinity gets a NaN as its scale and zeros. Never synchronizes, never allocates.
//
// Returns cudaErrorInvalidValue for another type of x, otherwise what the launch returns.
cudaError_t quantize_activation(QuantizeArguments const& arguments, cudaStream_t stream);

}  // namespace liquidgemm
