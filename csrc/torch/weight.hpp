// What packing and unpacking share on CPU and CUDA: argument checks, shapes and allocation.
#pragma once

#include "liquidgemm/common/int8.hpp"
#include "liquidgemm/common/math.hpp"
#include "liquidgemm/formats/formats.hpp"
#include "tensors.hpp"

namespace liquidgemm::binding {

inline constexpr char kInfeasible[] =
    "pack_weight: the weights are infeasible: some q * qscale + qoffset exceeds 255, so its "
    "8-bit weight would overflow. Expected weights from quantize_weight";

// Largest K of a weight: that of the activations in whole groups. The columns past kMaxK only ever
// meet zero activations.
inline constexpr int64_t kMaxPackedK = ceil_div(kMaxK, kBlockK) * kBlockK;

inline void check_k(char const* name, int64_t k, int64_t limit) {
  check(k <= limit, name, ": expected K <= ", limit,
        " so that int32 accumulation cannot overflow, got K = ", k);
}

// The bytes of a block, the last dimension of a packed weight, tell its format. What is of none is
// checked as LiquidQuant, and refused.
inline FormatId format_of(Tensor const& packed) {
  const auto found = packed.dim() > 0 ? format_with(packed.size(-1)) : std::nullopt;
  return found.value_or(FormatId::kLiquidQuant);
}

// Contiguous inputs together with the plain view of them, so that the memory outlives the view. Of
// all formats that have codes.
struct LogicalTensors {
  Tensor qweight, qscale, qoffset;
  int64_t k_blocks;
  FormatId format;

  // visitor(std::type_identity<Format>{}, its logical weight).
  template <class Visitor>
  auto visit(Visitor const& visitor) const {
    const LogicalWeight view{static_cast<uint8_t*>(qweight.data_ptr()),
                             static_cast<uint8_t*>(qscale.data_ptr()),
                             static_cast<uint8_t*>(qoffset.data_ptr()), qscale.size(0), k_blocks};
    switch (format) {
      case FormatId::kLiquidQuant6:
        return visitor(std::type_identity<LiquidQuant6>{}, LogicalWeight6{view});
      case FormatId::kLiquidQuantG32:
        return visitor(std::type_identity<LiquidQuantG32>{}, LogicalWeightG32{view});
      default:
        return visitor(std::type_identity<LiquidQuant>{}, view);
    }
  }
};

// Of a block's row, in logical tensors: bytes of codes, and groups.
inline int64_t code_bytes(FormatId format) {
  return format == FormatId::kLiquidQuant6 ? LiquidQuant6::kLogicalGroupBytes : kBlockK / 2;
}
inline int64_t groups_of(FormatId format) {
  return format == FormatId::kLiquidQuantG32 ? LiquidQuantG32::kGroups : 1;
}

inline LogicalTensors checked_logical(Tensor const& qweight,
                                      Tensor const& qscale,
                                      Tensor const& qoffset) {
  check_dtype("qweight", qweight, {ScalarType::Byte});
  check_dtype("qscale", qscale, {ScalarType::Byte});
  check_same_device("qscale", qscale, "qweight", qweight);
  check_dtype("qoffset", qoffset, {ScalarType::Byte});
  check_same_device("qoffset", qoffset, "qweight", qweight);
  check(qweight.dim() == 2 && qweight.size(0) > 0, "qweight: expected shape [N, K / 2], got ",
        shape_of(qweight));
  // The groups tell which one it is. What is of none is checked as LiquidQuant, and refused.
  FormatId format = FormatId::kLiquidQuant;
  for (FormatId id : {FormatId::kLiquidQuant6, FormatId::kLiquidQuantG32}) {
    if (qscale.dim() == 2 && qscale.size(1) > 0 &&
        qweight.size(1) * groups_of(id) == qscale.size(1) * code_bytes(id))
      format = id;
  }
  const int64_t n = qweight.size(0);
  const int64_t k = qweight.size(1) * kBlockK / code_bytes(format);
  check(k > 0 && k % kBlockK == 0, "qweight: expected [N, K / 2] with K a positive multiple of ",
        kBlockK, ", got shape ", shape_of(qweight));
  check_k("qweight", k, kMaxPackedK);
  const int64_t k_blocks = k / kBlockK, groups = k_blocks * groups_of(format);
  check_shape("qscale", qscale, {n, groups});
  check_shape("qoffset", qoffset, {n, groups});
  return {dense(qweight), dense(qscale), dense(qoffset), k_blocks, format};
}

// The same of INT8 weights.
struct LogicalInt8Tensors {
  Tensor qweight;
  LogicalInt8Weight view() const {
    return {static_cast<int8_t*>(qweight.data_ptr()), qweight.size(0), qweight.size(1) / kBlockK};
  }
};

inline LogicalInt8Tensors checked_logical_int8(Tensor const& qweight) {
  check_dtype("qweight", qweight, {ScalarType::Char});
  check(qweight.dim() == 2 && qweight.size(0) > 0 && qweight.size(1) > 0 &&
            qweight.size(1) % kBlockK == 0,
        "qweight: expected [N, K] with K a positive multiple of ", kBlockK, ", got shape ",
        shape_of(qweight));
  check_k("qweight", qweight.size(1), kMaxPackedK);
  return {dense(qweight)};
}

// On the device of `like`.
template <class Format>
Tensor empty_packed(Tensor const& like, typename Format::Logical const& w) {
  return allocate(like, {ceil_div(w.n, kBlockRows), w.k_blocks, Format::kBlockBytes},
                  ScalarType::Byte);
}

// Of a format that `packer` packs.
template <class Format>
void check_packed(Tensor const& packed, int64_t n, char const* packer) {
  check_dtype("packed", packed, {ScalarType::Byte});
  check(packed.dim() == 3 && packed.size(0) > 0 && packed.size(1) > 0 &&
            packed.size(2) == Format::kBlockBytes,
        "packed: expected a packed weight [ceil(N / ", kBlockRows, "), K / ", kBlockK, ", ",
        Format::kBlockBytes, "] from ", packer, ", got shape ", shape_of(packed));
  check_k("packed", packed.size(1) * kBlockK, kMaxPackedK);
  check(n > 0 && ceil_div(n, kBlockRows) == packed.size(0), "n: expected ",
        (packed.size(0) - 1) * kBlockRows + 1, " to ", packed.size(0) * kBlockRows,
        " rows for packed of shape ", shape_of(packed), ", got ", n);
}

inline LogicalTensors empty_logical(Tensor const& packed, int64_t n) {
  const FormatId told = format_of(packed);
  const FormatId format = told == FormatId::kInt8 ? FormatId::kLiquidQuant : told;
  visit_format(format, [&](auto of) {
    check_packed<typename decltype(of)::type>(packed, n, "pack_weight");
  });
  const int64_t k_blocks = packed.size(1), groups = k_blocks * groups_of(format);
  return {allocate(packed, {n, k_blocks * code_bytes(format)}, ScalarType::Byte),
          allocate(packed, {n, groups}, ScalarType::Byte),
          allocate(packed, {n, groups}, ScalarType::Byte), k_blocks, format};
}

inline LogicalInt8Tensors empty_logical_int8(Tensor const& packed, int64_t n) {
  check_packed<Int8>(packed, n, "pack_int8_weight");
  return {allocate(packed, {n, packed.size(1) * kBlockK}, ScalarType::Char)};
}

}  // namespace liquidgemm::binding
