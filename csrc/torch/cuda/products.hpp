// gemm and linear with the plan that the library selects, or with a given one.
#pragma once

#include <optional>

#include "../product.hpp"
#include "context.hpp"
#include "liquidgemm/plan/launch_plan.hpp"

namespace liquidgemm::binding {

// A plan for tests and benchmarks, on at most num_sms SMs (0: all).
struct Forced {
  Plan plan;
  int num_sms;
};

Tensor gemm_with(char const* op,
                 Tensor const& x,
                 Tensor const& x_scale,
                 Tensor const& weight,
                 Tensor const& weight_scale,
                 OptionalTensor const& bias,
                 OptionalType const& out_dtype,
                 bool follows_producer = false,
                 std::optional<Forced> const& forced = std::nullopt);

// A given plan runs in one launch, which quantizes.
Tensor linear_with(char const* op,
                   Tensor const& x,
                   Tensor const& weight,
                   Tensor const& weight_scale,
                   OptionalTensor const& bias,
                   std::optional<Forced> const& forced = std::nullopt);

// The kernel's bulk copies read multiples of 16 bytes.
inline Weight aligned_weight(Tensor const& x,
                             Tensor const& weight,
                             Tensor const& weight_scale,
                             OptionalTensor const& bias) {
  Weight result = checked_weight(x, weight, weight_scale, bias);
  if (!aligned_to_16(result.packed))
    result.packed = torch::stable::clone(result.packed);
  return result;
}

}  // namespace liquidgemm::binding
