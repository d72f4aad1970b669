#include "liquidgemm/linear.hpp"

#include "liquidgemm/common/math.hpp"
#include "liquidgemm/gemm.hpp"
#include "liquidgemm/quantize.hpp"

namespace liquidgemm {
namespace {

// The workspace holds int8 rows, aligned for TMA, followed by their scales.
int64_t row_bytes(Problem const& p) {
  return ceil_div(p.k, 16) * 16;
}

}  // namespace

int64_t linear_workspace_bytes(LaunchPlan const& plan) {
  if (plan.launches() == 1)
    return 0;
  return plan.problem.m * (row_bytes(plan.problem) + static_cast<int64_t>(sizeof(float)));
}

cudaError_t linear(LinearArguments const& a,
                   LaunchPlan const& plan,
                   void* workspace,
                   cudaStream_t stream) {
  Problem const& p = plan.problem;
  GemmArguments product{.x = a.x,
                        .x_type = a.x_type,
                        .x_stride = 0,
                        .x_scale = nullptr,
                        .weight = a.weight,
                        .weight_scale = a.weight_scale,
                        .bias = a.bias,
                        .bias_type = a.bias_type,
                        .y = a.y,
                        .y_type = a.y_type,
                        .y_stride = a.y_stride};
  switch (plan.activations) {
    case Activations::kQuantizeInKernel:
      if (!kernel_can_read(a.x_type, a.x))
        return cudaErrorInvalidValue;
      break;
    case Activations::kJustQuantized: {
      int8_t* const rows = static_cast<int8_t*>(workspace);
      float* const scale = reinterpret_cast<float*>(rows + p.m * row_bytes(p));
      const cudaError_t error = quantize_activation({.x = a.x,
                                                     .x_type = a.x_type,
                                                     .out = rows,
                                                     .out_stride = row_bytes(p),
                                                     .scale = scale,
                                                     .m = p.m,
                                                     .k = p.k},
                                                    stream);
      if (error != cudaSuccess)
        return error;
      product.x = rows;
      product.x_type = Element::kInt8;
      product.x_stride = row_bytes(p);
      product.x_scale = scale;
      break;
    }
    default:
      return cudaErrorInvalidValue;
  }
  return gemm(product, plan, stream);
}

}  // namespace liquidgemm
