#include "products.hpp"

#include "reference.hpp"

namespace liquidgemm::binding {

Tensor float_bias(Tensor const& bias) {
  return bias.scalar_type() == ScalarType::Float ? bias
                                                 : torch::stable::to(bias, ScalarType::Float);
}

Tensor multiply(cpu::Kernels const& kernels,
                Tensor const& x,
                OptionalTensor const& x_scale,
                Weight const& weight,
                ScalarType out_type) {
  const int64_t k = x.size(-1), n = weight.n();
  Tensor y = allocate(x, with_last(leading_sizes(x), n), out_type);
  const Tensor rows = dense(x);
  OptionalTensor bias, scale;
  if (weight.bias)
    bias = float_bias(*weight.bias);
  if (x_scale)
    scale = dense(*x_scale);
  cpu::GemmArguments arguments{};
  arguments.x = rows.const_data_ptr();
  arguments.x_type = x_scale ? Element::kInt8 : element_of(x.scalar_type());
  arguments.x_scale = scale ? static_cast<float const*>(scale->const_data_ptr()) : nullptr;
  arguments.weight = static_cast<uint8_t const*>(weight.packed.const_data_ptr());
  arguments.weight_scale = static_cast<float const*>(weight.scale.const_data_ptr());
  arguments.bias = bias ? static_cast<float const*>(bias->const_data_ptr()) : nullptr;
  arguments.y = y.mutable_data_ptr();
  arguments.y_type = element_of(out_type);
  arguments.m = rows_of(x);
  arguments.n = n;
  arguments.k = k;
  arguments.format = weight.format;
  cpu::gemm(kernels, arguments, on_torch_threads);
  return y;
}

}  // namespace liquidgemm::binding
