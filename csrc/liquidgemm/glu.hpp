// The activation of a gated MLP and its quantization, with one scale per token.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/common/gated_activation.hpp"

namespace liquidgemm {

struct GluArguments {
  void const* gate_up;  // [m, 2 k] without gaps: gates, then the other factors
  Element type;         // of gate_up and y: kBFloat16, kFloat16 or kFloat32
  GatedActivation activation;
  void* y;       // [m, k], before it is quantized, or null
  int8_t* out;   // [m, k]
  float* scale;  // [m]
  int64_t m, k;  // m below 2^31
};

// Enqueues y, with the roundings of gated() in common/activation.hpp, and what
// quantize_activation() makes of it. Never synchronizes, never allocates.
//
// Returns cudaErrorInvalidValue for other types, otherwise what the launch returns.
cudaError_t glu_quantize(GluArguments const& arguments, cudaStream_t stream);

}  // namespace liquidgemm
