#include "liquidgemm/moe.hpp"

#include "liquidgemm/plan.hpp"
#include "liquidgemm/plan/moe.hpp"
#include "ops.hpp"
#include "products.hpp"

namespace liquidgemm::binding {
namespace {

template <class T>
T* data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> moe_schedule_op(Tensor const& topk_ids, int64_t num_experts) {
  check_schedule(topk_ids, num_experts);
  check(num_experts <= kMostScheduledExperts, "num_experts: expected at most ",
        kMostScheduledExperts, ", got ", num_experts);
  const DeviceGuard guard(topk_ids.get_device_index());
  hopper_device("moe_schedule");
  const int64_t slots = topk_ids.numel();
  Tensor offsets = allocate(topk_ids, {num_experts + 1}, ScalarType::Int);
  Tensor row_of_slot = allocate(topk_ids, {slots}, ScalarType::Int);
  Tensor slot_of_row = allocate(topk_ids, {slots}, ScalarType::Int);
  const Tensor ids = dense(topk_ids);
  check_cuda(moe_schedule({.topk_ids = ids.const_data_ptr(),
                           .ids_are_64_bits = ids.scalar_type() == ScalarType::Long,
                           .slots = slots,
                           .experts = static_cast<int>(num_experts),
                           .offsets = data<int32_t>(offsets),
                           .row_of_slot = data<int32_t>(row_of_slot),
                           .slot_of_row = data<int32_t>(slot_of_row)},
                          current_stream(topk_ids)),
             "moe_schedule");
  return {offsets, row_of_slot, slot_of_row};
}

std::tuple<Tensor, Tensor> quantize_activation_rows_op(Tensor const& x,
                                                       Tensor const& slot_of_row,
                                                       int64_t top_k) {
  check_rows_of_schedule(x, slot_of_row, top_k);
  const DeviceGuard guard(x.get_device_index());
  hopper_device("quantize_activation_rows");
  const int64_t rows = slot_of_row.size(0), k = x.size(1);
  check(rows <= INT32_MAX && top_k <= INT32_MAX,
        "slot_of_row: expected fewer than 2^31 rows and slots per token, got ", rows, " and ",
        top_k);
  Tensor quantized = allocate(x, {rows, k}, ScalarType::Char);
  Tensor scale = allocate(x, {rows}, ScalarType::Float);
  const Tensor source = dense(x), index = dense(slot_of_row);
  check_cuda(quantize_rows({.x = source.const_data_ptr(),
                            .x_type = element_of(x.scalar_type()),
                            .index = static_cast<int32_t const*>(index.const_data_ptr()),
                            .order = RowOrder::kGather,
                            .top_k = static_cast<int>(top_k),
                            .out = data<int8_t>(quantized),
                            .out_stride = k,
                            .scale = data<float>(scale),
                            .tokens = x.size(0),
                            .rows = rows,
                            .k = k},
                           current_stream(x)),
             "quantize_activation_rows");
  return {quantized, scale};
}

Tensor moe_combine_op(Tensor const& y,
                      Tensor const& row_of_slot,
                      Tensor const& topk_weights,
                      OptionalTensor const& residual) {
  check_combine(y, row_of_slot, topk_weights, residual);
  const DeviceGuard guard(y.get_device_index());
  hopper_device("moe_combine");
  const int64_t tokens = topk_weights.size(0), n = y.size(1);
  check(topk_weights.numel() <= INT32_MAX, "topk_weights: expected fewer than 2^31 slots, got ",
        topk_weights.numel());
  Tensor out = allocate(y, {tokens, n}, y.scalar_type());
  const Tensor rows = dense(y), index = dense(row_of_slot), weights = dense(topk_weights);
  OptionalTensor added;
  if (residual)
    added = dense(*residual);
  check_cuda(moe_combine({.y = rows.const_data_ptr(),
                          .type = element_of(y.scalar_type()),
                          .row_of_slot = static_cast<int32_t const*>(index.const_data_ptr()),
                          .ids = {},
                          .weights = weights.const_data_ptr(),
                          .weights_type = element_of(weights.scalar_type()),
                          .residual = added ? added->const_data_ptr() : nullptr,
                          .out = out.mutable_data_ptr(),
                          .tokens = tokens,
                          .rows = y.size(0),
                          .n = n,
                          .top_k = static_cast<int>(topk_weights.size(1)),
                          .rows_are_visible = false},
                         current_stream(y)),
             "moe_combine");
  return out;
}

namespace {

// `forced`: indices of the plans by slots, or the first one -1: not by slots.
Tensor moe_of(Moe layer,
              Tensor const& x,
              Tensor const& topk_ids,
              Tensor const& topk_weights,
              std::optional<std::pair<int64_t, int64_t>> const& forced) {
  layer.first = aligned(std::move(layer.first));
  layer.second = aligned(std::move(layer.second));
  const DeviceGuard guard(x.get_device_index());
  const DeviceInfo device = hopper_device("moe");
  const int64_t tokens = x.size(0), hidden = x.size(1), rows = topk_ids.numel();
  const int64_t experts = layer.first.count(), inner = layer.first.n() / 2;
  Tensor out = allocate(x, {tokens, hidden}, x.scalar_type());
  if (tokens == 0)
    return out;
  // Both products, for what is said of sizes that are too large.
  const Problem p =
      checked_problem("moe", rows, layer.first.n(), hidden, layer.first.format, device);
  checked_problem("moe", rows, hidden, inner, layer.second.format, device);
  const Element type = element_of(x.scalar_type());
  const Tensor source = dense(x), ids = dense(topk_ids), weights = dense(topk_weights);
  MoePlan plan = plan_moe({.tokens = tokens,
                           .top_k = topk_ids.size(1),
                           .experts = experts,
                           .hidden = hidden,
                           .inner = inner,
                           .num_sms = p.num_sms,
                           .memory_bytes_per_us = p.memory_bytes_per_us,
                           .format = p.format,
                           .total_experts = layer.total_experts,
                           .x_is_readable = kernel_can_read(type, source.const_data_ptr())});
  check_countable("moe", plan.first);
  check_countable("moe", plan.second);
  if (forced && forced->first < 0) {
    plan.by_slots = std::nullopt;
  } else if (forced) {
    check(plan.by_slots.has_value(), "x: expected few enough tokens for products by slots, got ",
          tokens, ", of ", topk_ids.size(1), " slots each");
    plan.by_slots = {complete(plan.by_slots->first.problem, all_slot_plans()[forced->first]),
                     complete(plan.by_slots->second.problem, all_slot_plans()[forced->second])};
  }
  Tensor workspace = allocate(x, {moe_workspace_bytes(type, plan)}, ScalarType::Byte);
  const cudaError_t error = moe({.x = source.const_data_ptr(),
                                 .type = type,
                                 .topk_ids = ids.const_data_ptr(),
                                 .ids_are_64_bits = ids.scalar_type() == ScalarType::Long,
                                 .topk_weights = weights.const_data_ptr(),
                                 .weights_type = element_of(weights.scalar_type()),
                                 .first = view(layer.first),
                                 .second = view(layer.second),
                                 .gate = layer.gate,
                                 .out = out.mutable_data_ptr(),
                                 .tokens = tokens,
                                 .top_k = static_cast<int>(topk_ids.size(1))},
                                plan, workspace.mutable_data_ptr(), current_stream(x));
  if (error != cudaSuccess)
    fail("moe: ", explain(error), ", for ", describe(plan));
  return out;
}

}  // namespace

Tensor moe_op(Tensor const& x,
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
  return moe_of(checked_moe(x, topk_ids, topk_weights, w1, w1_scale, w2, w2_scale, b1, b2,
                            activation, total_experts),
                x, topk_ids, topk_weights, std::nullopt);
}

Tensor moe_by_slots_op(Tensor const& x,
                       Tensor const& topk_ids,
                       Tensor const& topk_weights,
                       Tensor const& w1,
                       Tensor const& w1_scale,
                       Tensor const& w2,
                       Tensor const& w2_scale,
                       OptionalTensor const& b1,
                       OptionalTensor const& b2,
                       std::string const& activation,
                       int64_t first,
                       int64_t second) {
  const int64_t plans = all_slot_plans().size();
  for (auto const& [name, plan] : {std::pair{"first", first}, {"second", second}})
    check(plan >= -1 && plan < plans, name, ": expected -1 to ", plans - 1, ", got ", plan);
  return moe_of(
      checked_moe(x, topk_ids, topk_weights, w1, w1_scale, w2, w2_scale, b1, b2, activation, 0), x,
      topk_ids, topk_weights, std::pair{first, second});
}

}  // namespace liquidgemm::binding
