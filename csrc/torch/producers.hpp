// What rms_norm_quantize and glu_quantize share on CPU and CUDA: argument checks and outputs.
#pragma once

#include <string>
#include <tuple>

#include "liquidgemm/common/activation.hpp"
#include "liquidgemm/common/norm.hpp"
#include "product.hpp"

namespace liquidgemm::binding {

// Contiguous inputs of a norm, checked.
struct Norm {
  Tensor x, weight;
  OptionalTensor residual;
  NormMode mode;
};

inline Norm checked_norm(Tensor const& x,
                         Tensor const& weight,
                         double eps,
                         OptionalTensor const& residual,
                         std::string const& mode,
                         double offset) {
  check_rows(x, kFloats);
  check_k("x", x.size(-1), kMaxK);
  check_dtype("weight", weight, kFloats);
  check_shape("weight", weight, {x.size(-1)}, " like the last dimension of x");
  check_same_device("weight", weight, "x", x);
  check(eps >= 0, "eps: expected a number >= 0, got ", eps);
  if (residual) {
    check_dtype("residual", *residual, {x.scalar_type()});
    check_shape("residual", *residual, with_last(leading_sizes(x), x.size(-1)), " like x");
    check_same_device("residual", *residual, "x", x);
  }
  check(mode == "llama" || mode == "gemma", "mode: expected llama or gemma, got ", mode);
  check(mode == "gemma" || offset == 0, "offset: expected 0 in mode llama, got ", offset);
  Norm norm{dense(x), dense(weight), std::nullopt,
            mode == "llama" ? NormMode::kLlama : NormMode::kGemma};
  if (residual)
    norm.residual = dense(*residual);
  return norm;
}

inline GatedActivation gated_activation(std::string const& name) {
  if (name == "silu_mul")
    return GatedActivation::kSiluMul;
  if (name == "gelu_tanh_mul")
    return GatedActivation::kGeluTanhMul;
  check(name == "swiglu_clamped",
        "activation: expected silu_mul or gelu_tanh_mul or swiglu_clamped, got ", name);
  return GatedActivation::kSwigluClamped;
}

// Returns K.
inline int64_t check_gate_up(Tensor const& gate_up) {
  check_dtype("gate_up", gate_up, kFloats);
  check(gate_up.dim() >= 1, "gate_up: expected at least 1 dimension, got shape ",
        shape_of(gate_up));
  const int64_t columns = gate_up.size(-1);
  check(columns >= 2, "gate_up: expected at least 2 columns, got shape ", shape_of(gate_up));
  check(columns % 2 == 0, "gate_up: expected an even number of columns, gates first, got shape ",
        shape_of(gate_up));
  check_k("gate_up", columns / 2, kMaxK);
  return columns / 2;
}

// Rows of int8 with their scales, of the leading sizes of `like`.
struct QuantizedRows {
  Tensor x8, scale;
  QuantizedRows(Tensor const& like, int64_t k)
      : x8(allocate(like, with_last(leading_sizes(like), k), ScalarType::Char)),
        scale(allocate(like, leading_sizes(like), ScalarType::Float)) {}

  int8_t* rows() { return static_cast<int8_t*>(x8.mutable_data_ptr()); }
  float* scales() { return static_cast<float*>(scale.mutable_data_ptr()); }
};

// Rows of `like`'s type if they are wanted, else an empty tensor.
inline Tensor rows_if(bool wanted, Tensor const& like, int64_t k) {
  return allocate(like, wanted ? with_last(leading_sizes(like), k) : std::vector<int64_t>{0},
                  like.scalar_type());
}

inline void* data_if(bool wanted, Tensor& rows) {
  return wanted ? rows.mutable_data_ptr() : nullptr;
}

}  // namespace liquidgemm::binding
