#include "../producers.hpp"

#include "context.hpp"
#include "liquidgemm/glu.hpp"
#include "liquidgemm/norm.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {
namespace {

int64_t checked_rows(char const* op, Tensor const& x) {
  const int64_t m = rows_of(x);
  check(m <= INT32_MAX, op, ": expected fewer than 2^31 rows, got ", m);
  return m;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize_op(Tensor const& x,
                                                                Tensor const& weight,
                                                                double eps,
                                                                OptionalTensor const& residual,
                                                                std::string mode,
                                                                double offset,
                                                                bool return_y) {
  Norm norm = checked_norm(x, weight, eps, residual, mode, offset);
  const int64_t m = checked_rows("rms_norm_quantize", x), k = x.size(-1);

  const DeviceGuard guard(x.get_device_index());
  hopper_device("rms_norm_quantize");
  const cudaStream_t stream = current_stream(x);
  if (weight.scalar_type() != x.scalar_type() && weight.scalar_type() != ScalarType::Float)
    norm.weight = torch::stable::to(norm.weight, ScalarType::Float);
  QuantizedRows out(x, k);
  Tensor h = rows_if(residual.has_value(), x, k), y = rows_if(return_y, x, k);
  check_cuda(
      rms_norm_quantize({.x = norm.x.const_data_ptr(),
                         .residual = norm.residual ? norm.residual->const_data_ptr() : nullptr,
                         .x_type = element_of(x.scalar_type()),
                         .weight = norm.weight.const_data_ptr(),
                         .weight_type = element_of(norm.weight.scalar_type()),
                         .weight_is_old = norm.weight.const_data_ptr() == weight.const_data_ptr(),
                         .mode = norm.mode,
                         .eps = static_cast<float>(eps),
                         .offset = static_cast<float>(offset),
                         .h = data_if(residual.has_value(), h),
                         .y = data_if(return_y, y),
                         .out = out.rows(),
                         .scale = out.scales(),
                         .m = m,
                         .k = k},
                        stream),
      "rms_norm_quantize");
  return {out.x8, out.scale, h, y};
}

std::tuple<Tensor, Tensor, Tensor> glu_quantize_op(Tensor const& gate_up,
                                                   std::string activation,
                                                   bool return_y) {
  const int64_t k = check_gate_up(gate_up);
  const GatedActivation gated = gated_activation(activation);
  const int64_t m = checked_rows("glu_quantize", gate_up);

  const DeviceGuard guard(gate_up.get_device_index());
  hopper_device("glu_quantize");
  const cudaStream_t stream = current_stream(gate_up);
  const Tensor rows = dense(gate_up);
  QuantizedRows out(gate_up, k);
  Tensor y = rows_if(return_y, gate_up, k);
  check_cuda(glu_quantize({.gate_up = rows.const_data_ptr(),
                           .type = element_of(gate_up.scalar_type()),
                           .activation = gated,
                           .y = data_if(return_y, y),
                           .out = out.rows(),
                           .scale = out.scales(),
                           .m = m,
                           .k = k},
                          stream),
             "glu_quantize");
  return {out.x8, out.scale, y};
}

}  // namespace liquidgemm::binding
