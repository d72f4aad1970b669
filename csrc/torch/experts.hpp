// What the ops of experts share on CPU and CUDA: argument checks, in the words of
// liquidgemm/ops/_grouped.py and _moe.py.
#pragma once

#include <string>

#include "liquidgemm/common/activation.hpp"
#include "product.hpp"

namespace liquidgemm::binding {

// By the name that the ops take.
inline std::optional<GatedActivation> gated_activation(std::string const& name) {
  if (name == "silu_mul")
    return GatedActivation::kSiluMul;
  if (name == "gelu_tanh_mul")
    return GatedActivation::kGeluTanhMul;
  if (name == "swiglu_clamped")
    return GatedActivation::kSwigluClamped;
  return std::nullopt;
}

// Channels of the gate, and as many of the other half, that follow each other in a weight whose
// product an activation ends.
inline constexpr int64_t kInterleave = 8;

inline void check_matrix(char const* name,
                         Tensor const& x,
                         std::initializer_list<ScalarType> allowed) {
  check_dtype(name, x, allowed);
  check(x.dim() == 2 && x.size(1) >= 1, name, ": expected shape [rows, columns >= 1], got ",
        shape_of(x));
}

// Names of a stacked weight, its scale and its bias.
struct ExpertNames {
  char const *weight, *scale, *bias;
};

// The weights of some experts: packed [E, panels, groups, block], scale [E, N], bias [E, N].
struct Experts {
  Tensor packed, scale;
  OptionalTensor bias;
  FormatId format;
  int64_t count() const { return scale.size(0); }
  int64_t n() const { return scale.size(1); }
};

inline Experts checked_experts(Tensor const& x,
                               int64_t k,
                               ExpertNames const& names,
                               Tensor const& weight,
                               Tensor const& scale,
                               OptionalTensor const& bias) {
  check_k("x", k, kMaxK);
  check_dtype(names.weight, weight, {ScalarType::Byte});
  check_dtype(names.scale, scale, {ScalarType::Float});
  check(scale.dim() == 2 && scale.size(0) >= 1 && scale.size(1) >= 1, names.scale,
        ": expected shape [E, N], got ", shape_of(scale));
  const int64_t experts = scale.size(0), n = scale.size(1);
  const FormatId format = format_of(weight);
  check(format == FormatId::kLiquidQuant, names.weight,
        ": expected 4-bit weights in groups of 64, which experts alone are compiled for, got ",
        format == FormatId::kInt8           ? "INT8"
        : format == FormatId::kLiquidQuant6 ? "6-bit"
                                            : "group-of-32",
        " weights of shape ", shape_of(weight));
  check_shape(names.weight, weight,
              {experts, ceil_div(n, kBlockRows), ceil_div(k, kBlockK), block_bytes(format)},
              " for E = ", experts, " and N = ", n, " of ", names.scale, " and K = ", k);
  if (bias) {
    check_dtype(names.bias, *bias, kFloats);
    check_shape(names.bias, *bias, {experts, n});
    check_same_device(names.bias, *bias, "x", x);
  }
  check_same_device(names.weight, weight, "x", x);
  check_same_device(names.scale, scale, "x", x);
  Experts result{dense(weight), dense(scale), std::nullopt, format};
  if (bias)
    result.bias = dense(*bias);
  return result;
}

// The activation of a layer of gated experts.
inline GatedActivation checked_gate(std::string const& activation,
                                    int64_t n,
                                    char const* scale_name) {
  const std::optional<GatedActivation> gate = gated_activation(activation);
  check(gate.has_value(), "activation: expected silu_mul or gelu_tanh_mul or swiglu_clamped, got '",
        activation, "'");
  check(n % (2 * kInterleave) == 0, scale_name, ": expected N a multiple of ", 2 * kInterleave,
        " with activation ", activation, ", got N = ", n);
  return *gate;
}

struct GroupedOutput {
  ScalarType type;
  std::optional<GatedActivation> gate;
};

inline GroupedOutput checked_grouped_output(Experts const& weight,
                                            OptionalTensor const& bias,
                                            OptionalType const& out_dtype,
                                            std::string const& activation) {
  GroupedOutput out{ScalarType::BFloat16, std::nullopt};
  if (activation != "none") {
    check(gated_activation(activation).has_value(),
          "activation: expected none or silu_mul or gelu_tanh_mul or swiglu_clamped, got '",
          activation, "'");
    out.gate = checked_gate(activation, weight.n(), "weight_scale");
  }
  out.type = checked_out_type(out_dtype, bias);
  check(out.type != ScalarType::Int || !out.gate,
        "activation: expected none with out_dtype int32, got ", activation);
  return out;
}

inline void check_grouped_rows(Tensor const& x, Tensor const& x_scale) {
  check_matrix("x", x, {ScalarType::Char});
  check_dtype("x_scale", x_scale, {ScalarType::Float});
  check_shape("x_scale", x_scale, {x.size(0)});
  check_same_device("x_scale", x_scale, "x", x);
}

inline void check_offsets(Tensor const& offsets, Tensor const& x, int64_t experts) {
  check_dtype("offsets", offsets, {ScalarType::Int});
  check_shape("offsets", offsets, {experts + 1}, " for E = ", experts, " of weight_scale");
  check_same_device("offsets", offsets, "x", x);
}

inline void check_ids(Tensor const& topk_ids) {
  check_dtype("topk_ids", topk_ids, {ScalarType::Int, ScalarType::Long});
  check(topk_ids.dim() == 2 && topk_ids.size(1) >= 1,
        "topk_ids: expected shape [tokens, top_k >= 1], got ", shape_of(topk_ids));
  constexpr int64_t kMostSlots = (int64_t{1} << 31) - 1;
  check(topk_ids.numel() <= kMostSlots, "topk_ids: expected at most ", kMostSlots, " entries, got ",
        topk_ids.numel());
}

inline void check_schedule(Tensor const& topk_ids, int64_t num_experts) {
  check_ids(topk_ids);
  check(num_experts >= 1, "num_experts: expected at least 1, got ", num_experts);
}

inline void check_rows_of_schedule(Tensor const& x, Tensor const& slot_of_row, int64_t top_k) {
  check_matrix("x", x, kFloats);
  check_dtype("slot_of_row", slot_of_row, {ScalarType::Int});
  check(slot_of_row.dim() == 1, "slot_of_row: expected shape [R], got ", shape_of(slot_of_row));
  check_same_device("slot_of_row", slot_of_row, "x", x);
  check(top_k >= 1, "top_k: expected at least 1, got ", top_k);
}

inline void check_combine(Tensor const& y,
                          Tensor const& row_of_slot,
                          Tensor const& topk_weights,
                          OptionalTensor const& residual) {
  check_matrix("y", y, kFloats);
  check_dtype("topk_weights", topk_weights, kFloats);
  check(topk_weights.dim() == 2 && topk_weights.size(1) >= 1,
        "topk_weights: expected shape [tokens, top_k >= 1], got ", shape_of(topk_weights));
  check_same_device("topk_weights", topk_weights, "y", y);
  check_dtype("row_of_slot", row_of_slot, {ScalarType::Int});
  check_shape("row_of_slot", row_of_slot, {topk_weights.numel()}, " for the shape of topk_weights");
  check_same_device("row_of_slot", row_of_slot, "y", y);
  if (residual) {
    check_dtype("residual", *residual, {y.scalar_type()});
    check_shape("residual", *residual, {topk_weights.size(0), y.size(1)});
    check_same_device("residual", *residual, "y", y);
  }
}

// Two layers of experts around an activation.
struct Moe {
  Experts first, second;
  GatedActivation gate;
  int64_t total_experts;  // of all GPUs; 0: as many as are here
};

inline Moe checked_moe(Tensor const& x,
                       Tensor const& topk_ids,
                       Tensor const& topk_weights,
                       Tensor const& w1,
                       Tensor const& w1_scale,
                       Tensor const& w2,
                       Tensor const& w2_scale,
                       OptionalTensor const& b1,
                       OptionalTensor const& b2,
                       std::string const& activation,
                       int64_t total_experts) {
  check_matrix("x", x, kFloats);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_ids(topk_ids);
  check(topk_ids.size(0) == tokens, "topk_ids: expected ", tokens, " tokens, got ",
        shape_of(topk_ids));
  check_same_device("topk_ids", topk_ids, "x", x);
  check_dtype("topk_weights", topk_weights, kFloats);
  check_shape("topk_weights", topk_weights, {tokens, topk_ids.size(1)});
  check_same_device("topk_weights", topk_weights, "x", x);
  Experts first = checked_experts(x, hidden, {"w1", "w1_scale", "b1"}, w1, w1_scale, b1);
  const GatedActivation gate = checked_gate(activation, first.n(), "w1_scale");
  check_dtype("w2_scale", w2_scale, {ScalarType::Float});
  check_shape("w2_scale", w2_scale, {first.count(), hidden}, " for E = ", first.count(),
              " of w1_scale and H = ", hidden, " of x");
  Experts second = checked_experts(x, first.n() / 2, {"w2", "w2_scale", "b2"}, w2, w2_scale, b2);
  check(total_experts == 0 || total_experts >= first.count(),
        "total_experts: expected 0 or at least the ", first.count(), " experts of w1, got ",
        total_experts);
  return {std::move(first), std::move(second), gate, total_experts};
}

}  // namespace liquidgemm::binding
