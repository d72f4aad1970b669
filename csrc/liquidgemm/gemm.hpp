// y = x W^T for int8 activations: plain pointers into device memory, plain sizes, a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/plan.hpp"

namespace liquidgemm {

// Sizes m, n and k are those of the plan's problem.
struct GemmArguments {
  void const* x;              // [m, k], aligned to 16 bytes
  Element x_type;             // kInt8, or as in linear() if the plan quantizes in the kernel
  int64_t x_stride;           // bytes between rows, a multiple of 16; ignored if not kInt8
  float const* x_scale;       // [m]; ignored if x is not kInt8
  uint8_t const* weight;      // from pack_weight(), aligned to 16 bytes
  float const* weight_scale;  // [n]
  void const* bias;           // [n] or null
  Element bias_type;          // kBFloat16, kFloat16 or kFloat32
  void* y;                    // [m, n], aligned to four elements if y_stride is a multiple of four
  Element y_type;             // kBFloat16, kFloat16 or kFloat32; kInt32: the sums, without scales
  int64_t y_stride;           // elements between rows
};

// Enqueues y = (x W^T) * x_scale * weight_scale + bias on the stream of the current device; the
// sums are exact. Needs a GPU of compute capability 9.0. Never synchronizes, never allocates.
//
// Returns cudaErrorInvalidValue if the plan's kernel does not take x_type, cudaErrorNotSupported
// if the driver has no tensor maps, otherwise what the launch returns.
cudaError_t gemm(GemmArguments const& arguments, LaunchPlan const& plan, cudaStream_t stream);

}  // namespace liquidgemm
