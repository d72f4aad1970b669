#include "ops.hpp"
#include "products.hpp"
#include "reference.hpp"

namespace liquidgemm::binding {

using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor gemm_cpu(Tensor const& x,
                Tensor const& x_scale,
                Tensor const& weight,
                Tensor const& weight_scale,
                OptionalTensor const& bias,
                OptionalType const& out_dtype,
                bool) {  // a matter of GPUs
  check_quantized_rows(x, x_scale);
  const Weight checked = checked_weight(x, weight, weight_scale, bias);
  const ScalarType out_type = checked_out_type(out_dtype, bias);
  if (cpu::Kernels const* const kernels = cpu::current_kernels())
    return multiply(*kernels, x, x_scale, checked, out_type);
  std::array stack{from(x),    from(x_scale), from(weight), from(weight_scale),
                   from(bias), from(out_type)};
  call_reference("liquidgemm_reference::gemm", stack);
  return to<Tensor>(stack[0]);
}

}  // namespace liquidgemm::binding
