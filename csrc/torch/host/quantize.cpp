#include "ops.hpp"
#include "reference.hpp"

namespace liquidgemm::binding {

using torch::stable::detail::from;
using torch::stable::detail::to;

std::tuple<Tensor, Tensor> quantize_activation_cpu(Tensor const& x) {
  check_rows(x, kFloats);
  cpu::Kernels const* const kernels = cpu::current_kernels();
  if (kernels == nullptr) {
    std::array stack{from(x), StableIValue{}};
    call_reference("liquidgemm_reference::quantize_activation", stack);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  const std::vector<int64_t> leading = leading_sizes(x);
  const int64_t k = x.size(-1);
  Tensor x8 = allocate(x, with_last(leading, k), ScalarType::Char);
  Tensor scale = allocate(x, leading, ScalarType::Float);
  const Tensor rows = dense(x);
  const cpu::QuantizeArguments arguments{rows.const_data_ptr(),
                                         element_of(x.scalar_type()),
                                         static_cast<int8_t*>(x8.mutable_data_ptr()),
                                         static_cast<float*>(scale.mutable_data_ptr()),
                                         rows_of(x),
                                         k};
  cpu::quantize_activation(*kernels, arguments, on_torch_threads);
  return {x8, scale};
}

}  // namespace liquidgemm::binding
