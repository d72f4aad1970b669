// A layer of experts, kernel by kernel. Each may start while the one before it runs:
//
//   kernel              waits for    lets the next one start   which reads before it waits
//   ------------------  -----------  ------------------------  ---------------------------
//   schedule            all before   at once                   nothing
//   quantize, scatter   schedule     when that is complete     offsets, weights
//   first product       quantize     when that is complete     slot_of_row
//   quantize, in place  product      at once                   offsets, weights
//   second product      quantize     when that is complete     row_of_slot
//   combine             product      at once
//
// For very few tokens:
//
//   first product       all before   when they are complete    topk_ids, weights
//   second product      product      when that is complete     topk_ids
//   combine             product      at once
#include "liquidgemm/moe.hpp"

#include <array>

#include "liquidgemm/common/math.hpp"

namespace liquidgemm {
namespace {

int64_t bytes_of(Element type) {
  return type == Element::kFloat32 ? 4 : 2;
}

// int8 rows as TMA wants them.
int64_t row_bytes(int64_t k) {
  return ceil_div(k, 16) * 16;
}

// Where each intermediate lies. What the second product reads and writes follows what the first
// one does, since the first one's tokens are no longer needed.
struct Workspace {
  int64_t offsets, row_of_slot, slot_of_row, x8, x_scale, h, h8, h_scale, y, bytes;

  Workspace(Element type, MoePlan const& plan) {
    GroupedProblem const& first = plan.first.problem;
    const int64_t rows = first.rows, hidden = first.k, inner = plan.second.problem.k;
    bytes = 0;
    offsets = take((first.experts + 1) * 4);
    row_of_slot = take(rows * 4);
    slot_of_row = take(rows * 4);
    x8 = take(rows * row_bytes(hidden));
    x_scale = take(rows * 4);
    h = take(rows * inner * bytes_of(type));
    h8 = take(rows * row_bytes(inner));
    h_scale = take(rows * 4);
    y = take(rows * hidden * bytes_of(type));
  }

 private:
  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += ceil_div(size, 256) * 256;
    return at;
  }
};

cudaError_t moe_by_slots(MoeArguments const& a,
                         MoePlan::BySlots const& plan,
                         uint8_t* h,
                         uint8_t* y,
                         cudaStream_t stream) {
  const ExpertIds ids{a.topk_ids, a.ids_are_64_bits, static_cast<int>(plan.first.problem.experts)};
  cudaError_t error = slot_gemm({.x = a.x,
                                 .type = a.type,
                                 .ids = ids,
                                 .slots_per_row = a.top_k,
                                 .weights = a.first,
                                 .gate = a.gate,
                                 .y = h,
                                 .ids_are_visible = false},
                                plan.first, stream);
  if (error != cudaSuccess)
    return error;
  error = slot_gemm({.x = h,
                     .type = a.type,
                     .ids = ids,
                     .slots_per_row = 1,
                     .weights = a.second,
                     .gate = std::nullopt,
                     .y = y,
                     .ids_are_visible = true},
                    plan.second, stream);
  if (error != cudaSuccess)
    return error;
  return moe_combine({.y = y,
                      .type = a.type,
                      .row_of_slot = nullptr,
                      .ids = ids,
                      .weights = a.topk_weights,
                      .weights_type = a.weights_type,
                      .residual = nullptr,
                      .out = a.out,
                      .tokens = a.tokens,
                      .rows = plan.first.problem.slots,
                      .n = plan.first.problem.k,
                      .top_k = a.top_k,
                      .rows_are_visible = true},
                     stream);
}

}  // namespace

int64_t moe_workspace_bytes(Element type, MoePlan const& plan) {
  return Workspace(type, plan).bytes;
}

cudaError_t moe(MoeArguments const& a, MoePlan const& plan, void* workspace, cudaStream_t stream) {
  const Workspace place(a.type, plan);
  const auto at = [&](int64_t offset) { return static_cast<uint8_t*>(workspace) + offset; };
  const auto ints = [&](int64_t offset) { return reinterpret_cast<int32_t*>(at(offset)); };
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(at(offset)); };
  const auto rows8 = [&](int64_t offset) { return reinterpret_cast<int8_t*>(at(offset)); };
  const int64_t rows = plan.first.problem.rows;
  const int64_t hidden = plan.first.problem.k, inner = plan.second.problem.k;
  if (rows == 0)
    return cudaSuccess;
  if (plan.by_slots)
    return moe_by_slots(a, *plan.by_slots, at(place.h), at(place.y), stream);

  cudaError_t error = moe_schedule({.topk_ids = a.topk_ids,
                                    .ids_are_64_bits = a.ids_are_64_bits,
                                    .slots = rows,
                                    .experts = static_cast<int>(plan.first.problem.experts),
                                    .offsets = ints(place.offsets),
                                    .row_of_slot = ints(place.row_of_slot),
                                    .slot_of_row = ints(place.slot_of_row)},
                                   stream);
  if (error != cudaSuccess)
    return error;
  error = quantize_rows({.x = a.x,
                         .x_type = a.type,
                         .index = ints(place.row_of_slot),
                         .order = RowOrder::kScatter,
                         .top_k = a.top_k,
                         .out = rows8(place.x8),
                         .out_stride = row_bytes(hidden),
                         .scale = floats(place.x_scale),
                         .tokens = a.tokens,
                         .rows = rows,
                         .k = hidden},
                        stream);
  if (error != cudaSuccess)
    return error;
  error = grouped_gemm({.x = at(place.x8),
                        .x_stride = row_bytes(hidden),
                        .x_scale = floats(place.x_scale),
                        .weights = a.first,
                        .offsets = ints(place.offsets),
                        .gate = a.gate,
                        .y = at(place.h),
                        .y_type = a.type,
                        .y_stride = inner,
                        .offsets_are_visible = true},
                       plan.first, stream);
  if (error != cudaSuccess)
    return error;
  error = quantize_rows({.x = at(place.h),
                         .x_type = a.type,
                         .index = ints(place.slot_of_row),
                         .order = RowOrder::kInPlace,
                         .top_k = 1,
                         .out = rows8(place.h8),
                         .out_stride = row_bytes(inner),
                         .scale = floats(place.h_scale),
                         .tokens = rows,
                         .rows = rows,
                         .k = inner},
                        stream);
  if (error != cudaSuccess)
    return error;
  error = grouped_gemm({.x = at(place.h8),
                        .x_stride = row_bytes(inner),
                        .x_scale = floats(place.h_scale),
                        .weights = a.second,
                        .offsets = ints(place.offsets),
                        .gate = std::nullopt,
                        .y = at(place.y),
                        .y_type = a.type,
                        .y_stride = hidden,
                        .offsets_are_visible = true},
                       plan.second, stream);
  if (error != cudaSuccess)
    return error;
  return moe_combine({.y = at(place.y),
                      .type = a.type,
                      .row_of_slot = ints(place.row_of_slot),
                      .ids = {},
                      .weights = a.topk_weights,
                      .weights_type = a.weights_type,
                      .residual = nullptr,
                      .out = a.out,
                      .tokens = a.tokens,
                      .rows = rows,
                      .n = hidden,
                      .top_k = a.top_k,
                      .rows_are_visible = true},
                     stream);
}

}  // namespace liquidgemm
