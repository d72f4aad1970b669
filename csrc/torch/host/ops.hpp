// The CPU side of the torch ops, one file each: check, allocate, one call. The checks are those of
// the CUDA ops, in the same words.
#pragma once

#include <tuple>

#include "../product.hpp"

namespace liquidgemm::binding {

std::tuple<Tensor, Tensor> quantize_activation_cpu(Tensor const& x);

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize_cpu(Tensor const& x,
                                                                 Tensor const& weight,
                                                                 double eps,
                                                                 OptionalTensor const& residual,
                                                                 std::string mode,
                                                                 double offset,
                                                                 bool return_y);
std::tuple<Tensor, Tensor, Tensor> glu_quantize_cpu(Tensor const& gate_up,
                                                    std::string activation,
                                                    bool return_y);

Tensor gemm_cpu(Tensor const& x,
                Tensor const& x_scale,
                Tensor const& weight,
                Tensor const& weight_scale,
                OptionalTensor const& bias,
                OptionalType const& out_dtype,
                bool follows_producer);

Tensor linear_cpu(Tensor const& x,
                  Tensor const& weight,
                  Tensor const& weight_scale,
                  OptionalTensor const& bias);

Tensor grouped_gemm_cpu(Tensor const& x,
                        Tensor const& x_scale,
                        Tensor const& weight,
                        Tensor const& weight_scale,
                        Tensor const& offsets,
                        OptionalTensor const& bias,
                        OptionalType const& out_dtype,
                        std::string const& activation);

std::tuple<Tensor, Tensor, Tensor> moe_schedule_cpu(Tensor const& topk_ids, int64_t num_experts);

std::tuple<Tensor, Tensor> quantize_activation_rows_cpu(Tensor const& x,
                                                        Tensor const& slot_of_row,
                                                        int64_t top_k);

Tensor moe_combine_cpu(Tensor const& y,
                       Tensor const& row_of_slot,
                       Tensor const& topk_weights,
                       OptionalTensor const& residual);

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
               int64_t total_experts);

Tensor pack_weight_cpu(Tensor const& qweight, Tensor const& qscale, Tensor const& qoffset);
std::tuple<Tensor, Tensor, Tensor> unpack_weight_cpu(Tensor const& packed, int64_t n);
Tensor pack_int8_weight_cpu(Tensor const& qweight);
Tensor unpack_int8_weight_cpu(Tensor const& packed, int64_t n);

// Names of the kernels that this processor can run; the chosen one, or "reference"; and a choice.
std::vector<std::string> cpu_kernels();
std::string cpu_kernel();
void set_cpu_kernel(std::string name);

// `_search` of liquidgemm/weights/quantize.py, whose docstring says what it takes and returns.
std::tuple<Tensor, Tensor, Tensor, Tensor> search_cpu(Tensor const& units,
                                                      int64_t rows,
                                                      OptionalTensor const& weight,
                                                      int64_t largest_code);

std::vector<std::string> plan_names();
// Of those that are compiled for a weight format, for m tokens; m = 0: for any number of them.
std::vector<int64_t> plausible_plans(int64_t m, std::string format);
std::vector<std::string> grouped_plan_names();
// One line in words: the plan of a grouped GEMM.
std::string grouped_plan(
    int64_t rows, int64_t experts, int64_t n, int64_t k, int64_t num_sms, double memory_tbps);
std::vector<std::string> slot_plan_names();
// One line in words: the launches of a layer of experts, and the plans of its products.
std::string moe_plan(int64_t tokens,
                     int64_t top_k,
                     int64_t experts,
                     int64_t total_experts,
                     int64_t hidden,
                     int64_t inner,
                     bool of_16_bits,
                     int64_t num_sms,
                     double memory_tbps);
// JSON, see plan/explain.hpp. `op`: "gemm", "gemm_behind_producer", or "linear" with 16-bit
// activations.
std::string explain_plan(int64_t m,
                         int64_t n,
                         int64_t k,
                         std::string op,
                         std::string format,
                         int64_t num_sms,
                         double memory_tbps);

}  // namespace liquidgemm::binding
