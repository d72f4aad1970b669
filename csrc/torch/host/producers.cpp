#include "../producers.hpp"

#include "liquidgemm/cpu/producers.hpp"
#include "ops.hpp"
#include "reference.hpp"

namespace liquidgemm::binding {

using torch::stable::detail::from;
using torch::stable::detail::to;

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize_cpu(Tensor const& x,
                                                                 Tensor const& weight,
                                                                 double eps,
                                                                 OptionalTensor const& residual,
                                                                 std::string mode,
                                                                 double offset,
                                                                 bool return_y) {
  const Norm norm = checked_norm(x, weight, eps, residual, mode, offset);
  cpu::Kernels const* const kernels = cpu::current_kernels();
  if (kernels == nullptr) {
    std::array stack{from(x),    from(weight), from(eps),     from(residual),
                     from(mode), from(offset), from(return_y)};
    call_reference("liquidgemm_reference::rms_norm_quantize", stack);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3])};
  }
  const int64_t k = x.size(-1);
  QuantizedRows out(x, k);
  Tensor h = rows_if(residual.has_value(), x, k), y = rows_if(return_y, x, k);
  const cpu::RmsNormRow row{norm.x.const_data_ptr(),
                            norm.residual ? norm.residual->const_data_ptr() : nullptr,
                            norm.weight.const_data_ptr(),
                            element_of(x.scalar_type()),
                            element_of(weight.scalar_type()),
                            norm.mode,
                            static_cast<float>(eps),
                            static_cast<float>(offset),
                            k,
                            data_if(residual.has_value(), h),
                            data_if(return_y, y)};
  cpu::rms_norm_quantize(*kernels, {row, out.rows(), out.scales(), rows_of(x)}, on_torch_threads);
  return {out.x8, out.scale, h, y};
}

std::tuple<Tensor, Tensor, Tensor> glu_quantize_cpu(Tensor const& gate_up,
                                                    std::string activation,
                                                    bool return_y) {
  const int64_t k = check_gate_up(gate_up);
  const GatedActivation gated = gated_activation(activation);
  cpu::Kernels const* const kernels = cpu::current_kernels();
  if (kernels == nullptr) {
    std::array stack{from(gate_up), from(activation), from(return_y)};
    call_reference("liquidgemm_reference::glu_quantize", stack);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  }
  QuantizedRows out(gate_up, k);
  Tensor y = rows_if(return_y, gate_up, k);
  const Tensor rows = dense(gate_up);
  const cpu::GluRow row{rows.const_data_ptr(), element_of(gate_up.scalar_type()), gated, k,
                        data_if(return_y, y)};
  cpu::glu_quantize(*kernels, {row, out.rows(), out.scales(), rows_of(gate_up)}, on_torch_threads);
  return {out.x8, out.scale, y};
}

}  // namespace liquidgemm::binding
