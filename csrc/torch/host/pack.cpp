#include <atomic>

#include "../tensors.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {

Tensor pack_weight_cpu(Tensor const& qweight, Tensor const& qscale, Tensor const& qoffset) {
  const LogicalTensors logical = checked_logical(qweight, qscale, qoffset);
  const LogicalWeight view = logical.view();
  Tensor packed = empty_packed(logical);
  uint8_t* const out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::atomic<bool> feasible{true};
  torch::stable::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    bool all = true;
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int row = 0; row < kBlockRows; ++row) {
        const LiquidQuant::Row at = LiquidQuant::row(row);
        for (int64_t kb = 0; kb < view.k_blocks; ++kb) {
          uint8_t* const block = out + (panel * view.k_blocks + kb) * LiquidQuant::kBlockBytes;
          all &= LiquidQuant::pack_row(view, panel, kb, at, block);
        }
      }
    }
    if (!all)
      feasible = false;
  });
  check(feasible, kInfeasible);
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> unpack_weight_cpu(Tensor const& packed, int64_t n) {
  const LogicalTensors logical = empty_logical(packed, n);
  const LogicalWeight view = logical.view();
  const Tensor source = dense(packed);
  uint8_t const* const in = static_cast<uint8_t const*>(source.const_data_ptr());
  torch::stable::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int row = 0; row < kBlockRows; ++row) {
        const LiquidQuant::Row at = LiquidQuant::row(row);
        for (int64_t kb = 0; kb < view.k_blocks; ++kb) {
          uint8_t const* const block = in + (panel * view.k_blocks + kb) * LiquidQuant::kBlockBytes;
          LiquidQuant::unpack_row(block, panel, kb, at, view);
        }
      }
    }
  });
  return {logical.qweight, logical.qscale, logical.qoffset};
}

}  // namespace liquidgemm::binding
