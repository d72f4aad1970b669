// Registration of the CUDA ops; their schemas are in liquidgemm/ops/_*.py and
// host/library.cpp.
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
}

STABLE_TORCH_LIBRARY_IMPL(liquidgemm_testing, CUDA, m) {
  using namespace liquidgemm::binding;
  m.impl("gemm_with_plan", TORCH_BOX(&gemm_with_plan_op));
  m.impl("grouped_gemm_with_plan", TORCH_BOX(&grouped_gemm_with_plan_op));
  m.impl("linear_with_plan", TORCH_BOX(&linear_with_plan_op));
}
