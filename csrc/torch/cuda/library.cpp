// Registration of the CUDA ops; their schemas are in liquidgemm/ops/_*.py and
// host/library.cpp. Those of the KV cache are here: liquidgemm/kv/_ops.py calls them for some of
// its formats.
#include "ops.hpp"

STABLE_TORCH_LIBRARY_IMPL(liquidgemm, CUDA, m) {
  using namespace liquidgemm::binding;
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation_op));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize_op));
  m.impl("glu_quantize", TORCH_BOX(&glu_quantize_op));
  m.impl("gemm", TORCH_BOX(&gemm_op));
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm_op));
  m.impl("moe_schedule", TORCH_BOX(&moe_schedule_op));
  m.impl("quantize_activation_rows", TORCH_BOX(&quantize_activation_rows_op));
  m.impl("moe_combine", TORCH_BOX(&moe_combine_op));
  m.impl("moe", TORCH_BOX(&moe_op));
  m.impl("pack_weight", TORCH_BOX(&pack_weight_op));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_op));
  m.impl("dequantize_packed", TORCH_BOX(&dequantize_packed_op));
  m.impl("pack_int8_weight", TORCH_BOX(&pack_int8_weight_op));
  m.impl("unpack_int8_weight", TORCH_BOX(&unpack_int8_weight_op));
}

STABLE_TORCH_LIBRARY_IMPL(liquidgemm_testing, CUDA, m) {
  using namespace liquidgemm::binding;
  m.impl("gemm_with_plan", TORCH_BOX(&gemm_with_plan_op));
  m.impl("grouped_gemm_with_plan", TORCH_BOX(&grouped_gemm_with_plan_op));
  m.impl("moe_by_slots", TORCH_BOX(&moe_by_slots_op));
  m.impl("linear_with_plan", TORCH_BOX(&linear_with_plan_op));
}

STABLE_TORCH_LIBRARY(liquidgemm_kv, m) {
  m.def(
      "write_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_params, "
      "Tensor(d!) v_params, Tensor lengths, Tensor? block_table=None, Tensor? k_center=None) -> "
      "()");
  m.def(
      "attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_params, Tensor v_params, "
      "Tensor lengths, float scale, Tensor? block_table=None, Tensor? starts=None, int window=0, "
      "float softcap=0.) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(liquidgemm_kv, CUDA, m) {
  using namespace liquidgemm::binding;
  m.impl("write_", TORCH_BOX(&kv_write_op));
  m.impl("attention", TORCH_BOX(&kv_attention_op));
}
