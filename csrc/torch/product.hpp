// What gemm, linear and quantize_activation share on CPU and CUDA: argument checks and shapes.
#pragma once

#include <optional>

#include "liquidgemm/common/element.hpp"
#include "tensors.hpp"
#include "weight.hpp"

namespace liquidgemm::binding {

using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<ScalarType>;

inline constexpr std::initializer_list<ScalarType> kFloats = {
    ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Char:
      return Element::kInt8;
    default:
      return Element::kInt32;
  }
}

struct Weight {
  Tensor packed, scale;
  OptionalTensor bias;
  FormatId format;
  int64_t n() const { return scale.size(0); }
};

inline void check_rows(Tensor const& x, std::initializer_list<ScalarType> allowed) {
  check_dtype("x", x, allowed);
  check(x.dim() >= 1, "x: expected at least 1 dimension, got shape ", shape_of(x));
  check(x.size(-1) >= 1, "x: expected at least 1 column, got shape ", shape_of(x));
}

inline Weight checked_weight(Tensor const& x,
                             Tensor const& weight,
                             Tensor const& weight_scale,
                             OptionalTensor const& bias) {
  const int64_t k = x.size(-1);
  check_k("x", k, kMaxK);
  check_dtype("weight", weight, {ScalarType::Byte});
  check_dtype("weight_scale", weight_scale, {ScalarType::Float});
  check(weight_scale.dim() == 1 && weight_scale.size(0) >= 1,
        "weight_scale: expected shape [N], got ", shape_of(weight_scale));
  const int64_t n = weight_scale.size(0);
  const FormatId format = format_of(weight);
  check_shape("weight", weight,
              {ceil_div(n, kBlockRows), ceil_div(k, kBlockK), block_bytes(format)}, " for N = ", n,
              " of weight_scale and K = ", k, " of x");
  if (bias) {
    check_dtype("bias", *bias, kFloats);
    check_shape("bias", *bias, {n});
    check_same_device("bias", *bias, "x", x);
  }
  check_same_device("weight", weight, "x", x);
  check_same_device("weight_scale", weight_scale, "x", x);
  Weight result{dense(weight), dense(weight_scale), std::nullopt, format};
  if (bias)
    result.bias = dense(*bias);
  return result;
}

// What gemm asks beyond checked_weight; returns the type of the output.
inline ScalarType checked_out_type(OptionalType const& out_dtype, OptionalTensor const& bias) {
  const ScalarType out_type = out_dtype.value_or(ScalarType::BFloat16);
  check_dtype("out_dtype", out_type,
              {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float, ScalarType::Int}, "");
  check(out_type != ScalarType::Int || !bias,
        "bias: expected None with out_dtype int32, got a tensor");
  return out_type;
}

inline void check_quantized_rows(Tensor const& x, Tensor const& x_scale) {
  check_rows(x, {ScalarType::Char});
  check_dtype("x_scale", x_scale, {ScalarType::Float});
  check_shape("x_scale", x_scale, leading_sizes(x));
  check_same_device("x_scale", x_scale, "x", x);
}

}  // namespace liquidgemm::binding
