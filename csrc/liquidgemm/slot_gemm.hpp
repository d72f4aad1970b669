// y = x W^T for few rows, each slot of a routing with the W of its expert: nothing is sorted, and
// the kernel quantizes x.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>

#include "liquidgemm/common/expert_ids.hpp"
#include "liquidgemm/grouped_gemm.hpp"
#include "liquidgemm/plan/slot_plan.hpp"

namespace liquidgemm {

// Sizes are those of the plan's problem.
struct SlotGemmArguments {
  void const* x;      // [rows, k] without gaps, aligned to 16 bytes
  Element type;       // of x and y: kBFloat16 or kFloat16
  ExpertIds ids;      // [slots]; the rows of slots without an expert are not written
  int slots_per_row;  // slot s is the row s / slots_per_row of x
  ExpertWeights weights;
  std::optional<GatedActivation> gate;  // as in grouped_gemm.hpp
  void* y;  // [slots, n], with a gate [slots, n / 2], without gaps, aligned to 16 bytes
  // Whether the ids were complete before the previous kernel on the stream could let this one
  // start: then weights are fetched while it runs.
  bool ids_are_visible;
};

// Enqueues the product on the stream of the current device. Never synchronizes, never allocates.
//
// Returns cudaErrorInvalidValue if the rows do not fit a CTA, or rows of y are no multiples of 16
// bytes; otherwise what the launch returns.
cudaError_t slot_gemm(SlotGemmArguments const& arguments,
                      SlotPlan const& plan,
                      cudaStream_t stream);

}  // namespace liquidgemm
