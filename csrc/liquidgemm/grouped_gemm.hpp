// y = x W^T for int8 activations whose rows are sorted by expert, each expert with its own W.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/common/gated_activation.hpp"
#include "liquidgemm/plan/grouped_plan.hpp"

namespace liquidgemm {

// The plan that the library selects for a problem, as if its rows had been given to experts at
// random.
GroupedPlan plan_grouped_gemm(GroupedProblem const& problem);

struct ExpertWeights {
  uint8_t const* packed;  // [experts] from pack_weight(), aligned to 16 bytes
  float const* scale;     // [experts, n]
  void const* bias;       // [experts, n] or null
  Element bias_type;      // kBFloat16, kFloat16 or kFloat32
};

// Sizes are those of the plan's problem. Rows offsets[e] to offsets[e + 1] are those of expert e;
// whatever the offsets hold, rows outside of x and y are neither read nor written.
struct GroupedGemmArguments {
  void const* x;         // int8 [rows, k], aligned to 16 bytes
  int64_t x_stride;      // bytes between rows, a multiple of 16
  float const* x_scale;  // [rows]
  ExpertWeights weights;
  int32_t const* offsets;  // [experts + 1], in device memory
  // If given, the channels of the weight are interleaved by eights: n is a multiple of 16, y is
  // aligned to 16 bytes, and its type is not kInt32.
  std::optional<GatedActivation> gate;
  void* y;           // [rows, n], with a gate n / 2: rows from offsets[experts] on are not written
  Element y_type;    // kBFloat16, kFloat16 or kFloat32; kInt32: the sums, without scales
  int64_t y_stride;  // elements between rows
  // Whether the offsets were complete before the previous kernel on the stream could let this one
  // start: then weights are fetched while it runs.
  bool offsets_are_visible;
};

// Enqueues the product on the stream of the current device. Needs a GPU of compute capability 9.0.
// Never synchronizes, never allocates; a graph that holds it can be replayed with other offsets.
//
// Returns cudaErrorInvalidValue if the problem has too many experts or tiles, if its format has no
// kernels for experts, or if a gated activation is asked for without what it needs;
// cudaErrorNotSupported if the driver has no tensor maps; otherwise what the launch returns.
cudaError_t grouped_gemm(GroupedGemmArguments const& arguments,
                         GroupedPlan const& plan,
                         cudaStream_t stream);

}  // namespace liquidgemm
