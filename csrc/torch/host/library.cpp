// Registration of the CPU ops, and of what is no user API: liquidgemm_testing is for tests and
// benchmarks, liquidgemm_plan for liquidgemm/plans.py.
#include "ops.hpp"

STABLE_TORCH_LIBRARY_IMPL(liquidgemm, CPU, m) {
  using namespace liquidgemm::binding;
  m.impl("pack_weight", TORCH_BOX(&pack_weight_cpu));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight_cpu));
}

STABLE_TORCH_LIBRARY(liquidgemm_plan, m) {
  m.def("names() -> str[]");
  m.def("plausible(int m) -> int[]");
  m.def("explain(int m, int n, int k, bool quantizes, int num_sms, float memory_tbps) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(liquidgemm_plan, CompositeExplicitAutograd, m) {
  using namespace liquidgemm::binding;
  m.impl("names", TORCH_BOX(&plan_names));
  m.impl("plausible", TORCH_BOX(&plausible_plans));
  m.impl("explain", TORCH_BOX(&explain_plan));
}

STABLE_TORCH_LIBRARY(liquidgemm_testing, m) {
  m.def(
      "gemm_with_plan(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
      "ScalarType? out_dtype, int plan, int num_sms) -> Tensor");
  m.def(
      "linear_with_plan(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int plan, "
      "int num_sms) -> Tensor");
}
