// gemm and linear with the plan that the library selects, or with a given one.
#pragma once

#include <optional>

#include "../experts.hpp"
#include "context.hpp"
#include "liquidgemm/grouped_gemm.hpp"
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

// The limits of what the scheduler of a grouped product counts.
void check_countable(char const* op, GroupedPlan const& plan);

// Whether the offsets were complete before the previous kernel could let this one start.
enum class Offsets { kFromPreviousKernel, kVisible };
Tensor grouped_gemm_with(char const* op,
                         Tensor const& x,
                         Tensor const& x_scale,
                         Experts const& weight,
                         Tensor const& offsets,
                         GroupedOutput const& out,
                         Offsets when,
                         std::optional<Forced> const& forced = std::nullopt);

// int8 rows as TMA wants them: a 16-byte aligned base and row stride.
struct Rows {
  Tensor storage;
  int64_t stride;
};

inline Rows aligned_rows(Tensor const& x, int64_t m, int64_t k, cudaStream_t stream) {
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= k && x.stride(0) % 16 == 0 &&
      aligned_to_16(x)) {
    return {x, x.stride(0)};
  }
  const Tensor rows = dense(x);
  if (k % 16 == 0 && aligned_to_16(rows))
    return {rows, k};
  const int64_t stride = ceil_div(k, 16) * 16;
  Tensor padded = allocate(x, {m, stride}, ScalarType::Char);
  check_cuda(cudaMemcpy2DAsync(padded.mutable_data_ptr(), stride, rows.const_data_ptr(), k, k, m,
                               cudaMemcpyDeviceToDevice, stream),
             "x");
  return {padded, stride};
}

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

inline ExpertWeights view(Experts const& experts) {
  return {static_cast<uint8_t const*>(experts.packed.const_data_ptr()),
          static_cast<float const*>(experts.scale.const_data_ptr()),
          experts.bias ? experts.bias->const_data_ptr() : nullptr,
          experts.bias ? element_of(experts.bias->scalar_type()) : Element::kFloat32};
}

inline Experts aligned(Experts experts) {
  if (!aligned_to_16(experts.packed))
    experts.packed = torch::stable::clone(experts.packed);
  return experts;
}

}  // namespace liquidgemm::binding
