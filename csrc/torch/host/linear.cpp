#include "ops.hpp"
#include "products.hpp"
#include "reference.hpp"

namespace liquidgemm::binding {

using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor linear_cpu(Tensor const& x,
                  Tensor const& weight,
                  Tensor const& weight_scale,
                  OptionalTensor const& bias) {
  check_rows(x, kFloats);
  const Weight checked = checked_weight(x, weight, weight_scale, bias);
  if (cpu::Kernels const* const kernels = cpu::current_kernels())
    return multiply(*kernels, x, std::nullopt, checked, x.scalar_type());
  std::array stack{from(x), from(weight), from(weight_scale), from(bias)};
  call_reference("liquidgemm_reference::linear", stack);
  return to<Tensor>(stack[0]);
}

}  // namespace liquidgemm::binding
