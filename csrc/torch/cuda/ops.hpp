// The CUDA ops, one file each: check, guard, stream, allocate, one call.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "../product.hpp"

namespace liquidgemm::binding {

std::tuple<Tensor, Tensor> quantize_activation_op(Tensor const& x);

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize_op(Tensor const& x,
                                                                Tensor const& weight,
                                                                double eps,
                                                                OptionalTensor const& residual,
                                                                std::string mode,
                                                                double offset,
                                                                bool return_y);
std::tuple<Tensor, Tensor, Tensor> glu_quantize_op(Tensor const& gate_up,
                                                   std::string activation,
                                                   bool return_y);

Tensor gemm_op(Tensor const& x,
               Tensor const& x_scale,
               Tensor const& weight,
               Tensor const& weight_scale,
               OptionalTensor const& bias,
               OptionalType const& out_dtype,
               bool follows_producer);

Tensor linear_op(Tensor const& x,
                 Tensor const& weight,
                 Tensor const& weight_scale,
                 OptionalTensor const& bias);

Tensor grouped_gemm_op(Tensor const& x,
                       Tensor const& x_scale,
                       Tensor const& weight,
                       Tensor const& weight_scale,
                       Tensor const& offsets,
                       OptionalTensor const& bias,
                       OptionalType const& out_dtype,
                       std::string const& activation);

std::tuple<Tensor, Tensor, Tensor> moe_schedule_op(Tensor const& topk_ids, int64_t num_experts);
std::tuple<Tensor, Tensor> quantize_activation_rows_op(Tensor const& x,
                                                       Tensor const& slot_of_row,
                                                       int64_t top_k);
Tensor moe_combine_op(Tensor const& y,
                      Tensor const& row_of_slot,
                      Tensor const& topk_weights,
                      OptionalTensor const& residual);
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
              int64_t total_experts);

Tensor pack_weight_op(Tensor const& qweight, Tensor const& qscale, Tensor const& qoffset);
std::tuple<Tensor, Tensor, Tensor> unpack_weight_op(Tensor const& packed, int64_t n);
Tensor dequantize_packed_op(Tensor const& weight,
                            Tensor const& weight_scale,
                            int64_t k,
                            ScalarType dtype);
Tensor pack_int8_weight_op(Tensor const& qweight);
Tensor unpack_int8_weight_op(Tensor const& packed, int64_t n);

void kv_write_op(Tensor const& k,
                 Tensor const& v,
                 Tensor const& k_cache,
                 Tensor const& v_cache,
                 Tensor const& k_params,
                 Tensor const& v_params,
                 Tensor const& lengths,
                 OptionalTensor const& block_table,
                 OptionalTensor const& k_center);
Tensor kv_attention_op(Tensor const& q,
                       Tensor const& k_cache,
                       Tensor const& v_cache,
                       Tensor const& k_params,
                       Tensor const& v_params,
                       Tensor const& lengths,
                       double scale,
                       OptionalTensor const& block_table,
                       OptionalTensor const& starts,
                       int64_t window,
                       double softcap);

// For tests and benchmarks: with the plan of this index, on at most num_sms SMs (0: all).
Tensor gemm_with_plan_op(Tensor const& x,
                         Tensor const& x_scale,
                         Tensor const& weight,
                         Tensor const& weight_scale,
                         OptionalTensor const& bias,
                         OptionalType const& out_dtype,
                         int64_t plan,
                         int64_t num_sms);
// The same of all_grouped_plans().
Tensor grouped_gemm_with_plan_op(Tensor const& x,
                                 Tensor const& x_scale,
                                 Tensor const& weight,
                                 Tensor const& weight_scale,
                                 Tensor const& offsets,
                                 OptionalTensor const& bias,
                                 OptionalType const& out_dtype,
                                 std::string const& activation,
                                 int64_t plan,
                                 int64_t num_sms);
// By products of slots, with the plans of these indices of all_slot_plans(); with `first` -1 not by
// slots.
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
                       int64_t second);
// In one launch, whether that pays or not.
Tensor linear_with_plan_op(Tensor const& x,
                           Tensor const& weight,
                           Tensor const& weight_scale,
                           OptionalTensor const& bias,
                           int64_t plan,
                           int64_t num_sms);

}  // namespace liquidgemm::binding
