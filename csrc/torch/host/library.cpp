// Registration of the CPU ops, and of what is no user API: liquidgemm_cpu is for
// liquidgemm/ops/_cpu.py and quantize.py, liquidgemm_plan for liquidgemm/ops/plans.py,
// liquidgemm_testing for tests and benchmarks.
#include "ops.hpp"

STABLE_TORCH_LIBRARY_IMPL(liquidgemm, CPU, m) {
  using namespace liquidgemm::binding;
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation_cpu));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize_cpu));
  m.impl("glu_quantize", TORCH_BOX(&glu_quantize_cpu));
  m.impl("gemm", TORCH_BOX(&gemm_cpu));
  m.impl("linear", TORCH_BOX(&linear_cpu));
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm_cpu));
  m.impl("moe_schedule", TORCH_BOX(&moe_schedule_cpu));
  m.impl("quantize_activation_rows", TORCH_BOX(&quantize_activation_rows_cpu));
  m.impl("moe_combine", TORCH_BOX(&moe_combine_cpu));
  m.impl("moe", TORCH_BOX(&moe_cpu));
  m.impl("pack_weight", TORCH_BOX(&pack_weight_cpu));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_cpu));
  m.impl("pack_int8_weight", TORCH_BOX(&pack_int8_weight_cpu));
  m.impl("unpack_int8_weight", TORCH_BOX(&unpack_int8_weight_cpu));
}

STABLE_TORCH_LIBRARY(liquidgemm_cpu, m) {
  m.def("kernels() -> str[]");
  m.def("kernel() -> str");
  m.def("set_kernel(str name) -> ()");
  m.def(
      "search(Tensor units, int rows, Tensor? weight, int largest_code) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(liquidgemm_cpu, CompositeExplicitAutograd, m) {
  using namespace liquidgemm::binding;
  m.impl("kernels", TORCH_BOX(&cpu_kernels));
  m.impl("kernel", TORCH_BOX(&cpu_kernel));
  m.impl("set_kernel", TORCH_BOX(&set_cpu_kernel));
  m.impl("search", TORCH_BOX(&search_cpu));
}

STABLE_TORCH_LIBRARY(liquidgemm_plan, m) {
  m.def("names() -> str[]");
  m.def("plausible(int m, str format) -> int[]");
  m.def("grouped_names() -> str[]");
  m.def("grouped(int rows, int experts, int n, int k, int num_sms, float memory_tbps) -> str");
  m.def("slot_names() -> str[]");
  m.def(
      "moe(int tokens, int top_k, int experts, int total_experts, int hidden, int inner, "
      "bool of_16_bits, int num_sms, float memory_tbps) -> str");
  m.def("explain(int m, int n, int k, str op, str format, int num_sms, float memory_tbps) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(liquidgemm_plan, CompositeExplicitAutograd, m) {
  using namespace liquidgemm::binding;
  m.impl("names", TORCH_BOX(&plan_names));
  m.impl("grouped_names", TORCH_BOX(&grouped_plan_names));
  m.impl("grouped", TORCH_BOX(&grouped_plan));
  m.impl("slot_names", TORCH_BOX(&slot_plan_names));
  m.impl("moe", TORCH_BOX(&moe_plan));
  m.impl("plausible", TORCH_BOX(&plausible_plans));
  m.impl("explain", TORCH_BOX(&explain_plan));
}

STABLE_TORCH_LIBRARY(liquidgemm_testing, m) {
  m.def(
      "gemm_with_plan(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
      "ScalarType? out_dtype, int plan, int num_sms) -> Tensor");
  m.def(
      "grouped_gemm_with_plan(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, "
      "Tensor offsets, Tensor? bias, ScalarType? out_dtype, str activation, int plan, int num_sms) "
      "-> Tensor");
  m.def(
      "moe_by_slots(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor w1, Tensor w1_scale, "
      "Tensor w2, Tensor w2_scale, Tensor? b1, Tensor? b2, str activation, int first, int second) "
      "-> Tensor");
  m.def(
      "linear_with_plan(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int plan, "
      "int num_sms) -> Tensor");
}
