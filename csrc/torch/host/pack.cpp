#include <atomic>

#include "../tensors.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {
namespace {

// function(panel, k block, row, block) for every row of every block. Returns whether it always
// returned true.
template <class Format, class Function>
bool for_rows(Tensor const& packed, Function const& function) {
  std::atomic<bool> every{true};
  const int64_t k_blocks = packed.size(1);
  torch::stable::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    bool all = true;
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int row = 0; row < kBlockRows; ++row) {
        const typename Format::Row at = Format::row(row);
        for (int64_t kb = 0; kb < k_blocks; ++kb)
          all &= function(panel, kb, at, (panel * k_blocks + kb) * Format::kBlockBytes);
      }
    }
    if (!all)
      every = false;
  });
  return every;
}

template <class Format>
bool pack(typename Format::Logical const& logical, Tensor const& packed) {
  uint8_t* const out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  return for_rows<Format>(
      packed, [&](int64_t panel, int64_t kb, typename Format::Row const& at, int64_t block) {
        return Format::pack_row(logical, panel, kb, at, out + block);
      });
}

template <class Format>
void unpack(Tensor const& packed, typename Format::Logical const& logical) {
  const Tensor source = dense(packed);
  uint8_t const* const in = static_cast<uint8_t const*>(source.const_data_ptr());
  for_rows<Format>(packed,
                   [&](int64_t panel, int64_t kb, typename Format::Row const& at, int64_t block) {
                     Format::unpack_row(in + block, panel, kb, at, logical);
                     return true;
                   });
}

}  // namespace

Tensor pack_weight_cpu(Tensor const& qweight, Tensor const& qscale, Tensor const& qoffset) {
  const LogicalTensors logical = checked_logical(qweight, qscale, qoffset);
  return logical.visit([&](auto of, auto const& weight) {
    using Format = typename decltype(of)::type;
    const Tensor packed = empty_packed<Format>(qweight, weight);
    check(pack<Format>(weight, packed), kInfeasible);
    return packed;
  });
}

std::tuple<Tensor, Tensor, Tensor> unpack_weight_cpu(Tensor const& packed, int64_t n) {
  const LogicalTensors logical = empty_logical(packed, n);
  logical.visit(
      [&](auto of, auto const& weight) { unpack<typename decltype(of)::type>(packed, weight); });
  return {logical.qweight, logical.qscale, logical.qoffset};
}

Tensor pack_int8_weight_cpu(Tensor const& qweight) {
  const LogicalInt8Tensors logical = checked_logical_int8(qweight);
  const Tensor packed = empty_packed<Int8>(qweight, logical.view());
  pack<Int8>(logical.view(), packed);
  return packed;
}

Tensor unpack_int8_weight_cpu(Tensor const& packed, int64_t n) {
  const LogicalInt8Tensors logical = empty_logical_int8(packed, n);
  unpack<Int8>(packed, logical.view());
  return logical.qweight;
}

}  // namespace liquidgemm::binding
