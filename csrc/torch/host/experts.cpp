#include "../experts.hpp"

#include "liquidgemm/cpu/experts.hpp"
#include "ops.hpp"
#include "products.hpp"
#include "reference.hpp"

namespace liquidgemm::binding {

using torch::stable::detail::from;
using torch::stable::detail::to;

namespace {

template <class T>
T const* data(Tensor const& tensor) {
  return static_cast<T const*>(tensor.const_data_ptr());
}

Tensor grouped_product(cpu::Kernels const& kernels,
                       Tensor const& x,
                       Tensor const& x_scale,
                       Experts const& weight,
                       Tensor const& offsets,
                       GroupedOutput const& out) {
  const int64_t n = weight.n();
  Tensor y = allocate(x, {x.size(0), out.gate ? n / 2 : n}, out.type);
  const Tensor rows = dense(x), scale = dense(x_scale), ends = dense(offsets);
  OptionalTensor bias;
  if (weight.bias)
    bias = float_bias(*weight.bias);
  cpu::GroupedArguments a{};
  a.product.x = rows.const_data_ptr();
  a.product.x_type = Element::kInt8;
  a.product.x_scale = data<float>(scale);
  a.product.weight = data<uint8_t>(weight.packed);
  a.product.weight_scale = data<float>(weight.scale);
  a.product.bias = bias ? data<float>(*bias) : nullptr;
  a.product.y = y.mutable_data_ptr();
  a.product.y_type = element_of(out.type);
  a.product.m = x.size(0);
  a.product.n = n;
  a.product.k = x.size(1);
  a.offsets = data<int32_t>(ends);
  a.experts = weight.count();
  a.gate = out.gate;
  cpu::grouped_gemm(kernels, a, on_torch_threads);
  return y;
}

// Of the first rows of x; the others are not written.
std::tuple<Tensor, Tensor> quantized_rows(cpu::Kernels const& kernels,
                                          Tensor const& x,
                                          int64_t rows) {
  const int64_t k = x.size(1);
  Tensor x8 = allocate(x, {x.size(0), k}, ScalarType::Char);
  Tensor scale = allocate(x, {x.size(0)}, ScalarType::Float);
  const cpu::QuantizeArguments a{x.const_data_ptr(),
                                 element_of(x.scalar_type()),
                                 static_cast<int8_t*>(x8.mutable_data_ptr()),
                                 static_cast<float*>(scale.mutable_data_ptr()),
                                 rows,
                                 k};
  cpu::quantize_activation(kernels, a, on_torch_threads);
  return {x8, scale};
}

}  // namespace

Tensor grouped_gemm_cpu(Tensor const& x,
                        Tensor const& x_scale,
                        Tensor const& weight,
                        Tensor const& weight_scale,
                        Tensor const& offsets,
                        OptionalTensor const& bias,
                        OptionalType const& out_dtype,
                        std::string const& activation) {
  check_grouped_rows(x, x_scale);
  const Experts experts =
      checked_experts(x, x.size(1), {"weight", "weight_scale", "bias"}, weight, weight_scale, bias);
  check_offsets(offsets, x, experts.count());
  const GroupedOutput out = checked_grouped_output(experts, bias, out_dtype, activation);
  if (cpu::Kernels const* const kernels = cpu::current_kernels())
    return grouped_product(*kernels, x, x_scale, experts, offsets, out);
  std::array stack{from(x),       from(x_scale), from(weight),   from(weight_scale),
                   from(offsets), from(bias),    from(out.type), from(activation)};
  call_reference("liquidgemm_reference::grouped_gemm", stack);
  return to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor, Tensor> moe_schedule_cpu(Tensor const& topk_ids, int64_t num_experts) {
  check_schedule(topk_ids, num_experts);
  if (cpu::current_kernels() == nullptr) {
    std::array stack{from(topk_ids), from(num_experts), StableIValue{}};
    call_reference("liquidgemm_reference::moe_schedule", stack);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  }
  const int64_t slots = topk_ids.numel();
  Tensor offsets = allocate(topk_ids, {num_experts + 1}, ScalarType::Int);
  Tensor row_of_slot = allocate(topk_ids, {slots}, ScalarType::Int);
  Tensor slot_of_row = allocate(topk_ids, {slots}, ScalarType::Int);
  const Tensor ids = dense(topk_ids);
  const auto schedule = [&](auto const* data) {
    cpu::schedule(data, slots, num_experts, static_cast<int32_t*>(offsets.mutable_data_ptr()),
                  static_cast<int32_t*>(row_of_slot.mutable_data_ptr()),
                  static_cast<int32_t*>(slot_of_row.mutable_data_ptr()));
  };
  if (ids.scalar_type() == ScalarType::Int)
    schedule(data<int32_t>(ids));
  else
    schedule(data<int64_t>(ids));
  return {offsets, row_of_slot, slot_of_row};
}

std::tuple<Tensor, Tensor> quantize_activation_rows_cpu(Tensor const& x,
                                                        Tensor const& slot_of_row,
                                                        int64_t top_k) {
  check_rows_of_schedule(x, slot_of_row, top_k);
  cpu::Kernels const* const kernels = cpu::current_kernels();
  if (kernels == nullptr) {
    std::array stack{from(x), from(slot_of_row), from(top_k)};
    call_reference("liquidgemm_reference::quantize_activation_rows", stack);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  const int64_t rows = slot_of_row.size(0), k = x.size(1);
  Tensor x8 = allocate(x, {rows, k}, ScalarType::Char);
  Tensor scale = allocate(x, {rows}, ScalarType::Float);
  const Tensor tokens = dense(x), slots = dense(slot_of_row);
  cpu::QuantizeRowsArguments a{};
  a.quantize = {tokens.const_data_ptr(),
                element_of(x.scalar_type()),
                static_cast<int8_t*>(x8.mutable_data_ptr()),
                static_cast<float*>(scale.mutable_data_ptr()),
                x.size(0),
                k};
  a.slot_of_row = data<int32_t>(slots);
  a.rows = rows;
  a.top_k = top_k;
  cpu::quantize_activation_rows(*kernels, a, on_torch_threads);
  return {x8, scale};
}

Tensor moe_combine_cpu(Tensor const& y,
                       Tensor const& row_of_slot,
                       Tensor const& topk_weights,
                       OptionalTensor const& residual) {
  check_combine(y, row_of_slot, topk_weights, residual);
  if (cpu::current_kernels() == nullptr) {
    std::array stack{from(y), from(row_of_slot), from(topk_weights), from(residual)};
    call_reference("liquidgemm_reference::moe_combine", stack);
    return to<Tensor>(stack[0]);
  }
  const int64_t tokens = topk_weights.size(0), columns = y.size(1);
  Tensor out = allocate(y, {tokens, columns}, y.scalar_type());
  const Tensor rows = dense(y), slots = dense(row_of_slot), weights = dense(topk_weights);
  OptionalTensor start;
  if (residual)
    start = dense(*residual);
  cpu::CombineArguments a{};
  a.y = rows.const_data_ptr();
  a.type = element_of(y.scalar_type());
  a.rows = y.size(0);
  a.columns = columns;
  a.row_of_slot = data<int32_t>(slots);
  a.weights = weights.const_data_ptr();
  a.weight_type = element_of(weights.scalar_type());
  a.residual = start ? start->const_data_ptr() : nullptr;
  a.out = out.mutable_data_ptr();
  a.tokens = tokens;
  a.top_k = topk_weights.size(1);
  cpu::combine(a, on_torch_threads);
  return out;
}

Tensor moe_cpu(Tensor const& x,
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
  const Moe moe = checked_moe(x, topk_ids, topk_weights, w1, w1_scale, w2, w2_scale, b1, b2,
                              activation, total_experts);
  cpu::Kernels const* const kernels = cpu::current_kernels();
  if (kernels == nullptr) {
    std::array stack{from(x),        from(topk_ids),   from(topk_weights), from(w1),
                     from(w1_scale), from(w2),         from(w2_scale),     from(b1),
                     from(b2),       from(activation), from(total_experts)};
    call_reference("liquidgemm_reference::moe", stack);
    return to<Tensor>(stack[0]);
  }
  const ScalarType type = x.scalar_type();
  const auto [offsets, row_of_slot, slot_of_row] = moe_schedule_cpu(topk_ids, moe.first.count());
  const auto [x8, x_scale] = quantize_activation_rows_cpu(x, slot_of_row, topk_ids.size(1));
  const Tensor h = grouped_product(*kernels, x8, x_scale, moe.first, offsets, {type, moe.gate});
  const int64_t rows = data<int32_t>(offsets)[moe.first.count()];
  const auto [h8, h_scale] = quantized_rows(*kernels, h, rows);
  const Tensor y =
      grouped_product(*kernels, h8, h_scale, moe.second, offsets, {type, std::nullopt});
  return moe_combine_cpu(y, row_of_slot, topk_weights, std::nullopt);
}

}  // namespace liquidgemm::binding
