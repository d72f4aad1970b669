// The product that gemm and linear compute on the CPU.
#pragma once

#include "../product.hpp"
#include "liquidgemm/cpu/gemm.hpp"

namespace liquidgemm::binding {

// The bias that kernels take: contiguous float32.
Tensor float_bias(Tensor const& bias);

// x is int8 with x_scale, or a float type without.
Tensor multiply(cpu::Kernels const& kernels,
                Tensor const& x,
                OptionalTensor const& x_scale,
                Weight const& weight,
                ScalarType out_type);

}  // namespace liquidgemm::binding
