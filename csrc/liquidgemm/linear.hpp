// A linear layer: quantizes its activations, then multiplies, in one launch or in two.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/plan.hpp"

namespace liquidgemm {

// Sizes m, n and k are those of the plan's problem.
struct LinearArguments {
  void const* x;              // [m, k] without gaps
  Element x_type;             // kBFloat16, kFloat16 or kFloat32
  uint8_t const* weight;      // from pack_weight(), aligned to 16 bytes
  float const* weight_scale;  // [n]
  void const* bias;           // [n] or null
  Element bias_type;          // kBFloat16, kFloat16 or kFloat32
  void* y;                    // [m, n], aligned to four elements if y_stride is a multiple of four
  Element y_type;             // kBFloat16, kFloat16 or kFloat32
  int64_t y_stride;           // elements between rows
};

// Bytes of device memory that linear() needs with this plan: the quantized activations of two
// launches. 0 if there is one.
int64_t linear_workspace_bytes(LaunchPlan const& plan);

// Enqueues quantize_activation() and gemm(), with the same results whatever the plan, which is from
// plan_linear(). The workspace, aligned to 16 bytes, is in use until the stream has come this far;
// null if no bytes are needed. Never synchronizes, never allocates.
//
// Returns cudaErrorInvalidValue if the plan is not a linear layer's, or does not fit x; otherwise
// as gemm().
cudaError_t linear(LinearArguments const& arguments,
                   LaunchPlan const& plan,
                   void* workspace,
                   cudaStream_t stream);

}  // namespace liquidgemm
