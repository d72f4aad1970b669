// CPU side of the torch ops: the packer, and the pure functions that tests and `liquidgemm info`
// ask.
#include <atomic>

#include "liquidgemm/plan/plan.hpp"
#include "weight.hpp"

namespace liquidgemm::binding {
namespace {

Tensor pack_weight(Tensor const& qweight, Tensor const& qscale, Tensor const& qoffset) {
  const LogicalTensors logical = checked_logical(qweight, qscale, qoffset);
  const LogicalWeight view = logical.view();
  Tensor packed = empty_packed(logical);
  uint8_t* const out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::atomic<bool> feasible{true};
  torch::stable::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    bool all = true;
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int row = 0; row < kBlockRows; ++row) {
        const BlockRow at = block_row(row);
        for (int64_t kb = 0; kb < view.k_blocks; ++kb) {
          uint8_t* const block = out + (panel * view.k_blocks + kb) * kBlockBytes;
          all &= pack_block_row(view, panel, kb, at, block);
        }
      }
    }
    if (!all)
      feasible = false;
  });
  check(feasible, kInfeasible);
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> unpack_weight(Tensor const& packed, int64_t n) {
  const LogicalTensors logical = empty_logical(packed, n);
  const LogicalWeight view = logical.view();
  const Tensor source = torch::stable::contiguous(packed);
  uint8_t const* const in = static_cast<uint8_t const*>(source.const_data_ptr());
  torch::stable::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int row = 0; row < kBlockRows; ++row) {
        const BlockRow at = block_row(row);
        for (int64_t kb = 0; kb < view.k_blocks; ++kb) {
          uint8_t const* const block = in + (panel * view.k_blocks + kb) * kBlockBytes;
          unpack_block_row(block, panel, kb, at, view);
        }
      }
    }
  });
  return {logical.qweight, logical.qscale, logical.qoffset};
}

std::vector<std::string> config_names() {
  std::vector<std::string> names;
  for (Plan const& plan : all_plans())
    names.push_back(name(plan));
  return names;
}

std::vector<int64_t> plausible_configs(int64_t m) {
  std::vector<int64_t> configs;
  for (size_t i = 0; i < all_plans().size(); ++i) {
    if (is_plausible(all_plans()[i].tile, m))
      configs.push_back(static_cast<int64_t>(i));
  }
  return configs;
}

std::string select_config(int64_t m, int64_t n, int64_t k, int64_t num_sms, double memory_tbps) {
  check(m > 0 && n > 0 && k > 0 && num_sms > 0 && memory_tbps > 0,
        "select_config: expected positive sizes, got m=", m, " n=", n, " k=", k,
        " num_sms=", num_sms, " memory_tbps=", memory_tbps);
  const Problem problem{m, n, k, static_cast<int>(num_sms), memory_tbps * 1e6};
  return describe(problem, select_plan(problem));
}

}  // namespace
}  // namespace liquidgemm::binding

STABLE_TORCH_LIBRARY_IMPL(liquidgemm, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&liquidgemm::binding::pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&liquidgemm::binding::unpack_weight));
}

// Not user API: what tests, benchmarks and `liquidgemm info` need to see of the library's inside.
STABLE_TORCH_LIBRARY(liquidgemm_testing, m) {
  m.def("config_names() -> str[]");
  m.def("plausible_configs(int m) -> int[]");
  m.def("select_config(int m, int n, int k, int num_sms, float memory_tbps=3.35) -> str");
  m.def(
      "gemm_with_config(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? "
      "bias, "
      "ScalarType? out_dtype, int config, int num_sms) -> Tensor");
  m.def(
      "linear_with_config(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int config, "
      "int num_sms) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(liquidgemm_testing, CompositeExplicitAutograd, m) {
  m.impl("config_names", TORCH_BOX(&liquidgemm::binding::config_names));
  m.impl("plausible_configs", TORCH_BOX(&liquidgemm::binding::plausible_configs));
  m.impl("select_config", TORCH_BOX(&liquidgemm::binding::select_config));
}
