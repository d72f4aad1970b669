// Packed weights to floats, for matrix products by others: the backward pass.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/formats/format_id.hpp"

namespace liquidgemm {

struct DequantizeArguments {
  uint8_t const* packed;  // [ceil(n / 64), ceil(k / 64)] blocks, aligned to 16 bytes
  float const* scale;     // [n]
  void* out;              // [n, k] without gaps
  Element type;           // kBFloat16, kFloat16 or kFloat32
  int64_t n, k;
  FormatId format = FormatId::kLiquidQuant;  // of packed
};

// Enqueues out = cast(float32(w8) * scale), rounded once per operation. Never synchronizes, never
// allocates.
//
// Returns cudaErrorInvalidValue for another type, otherwise what the launch returns.
cudaError_t dequantize(DequantizeArguments const& arguments, cudaStream_t stream);

}  // namespace liquidgemm
