// Logical <-> packed weights, one block at a time; the same code runs on the host and on the GPU.
#pragma once

#include <cstdint>

#include "liquidgemm/quant/packed_layout.hpp"

namespace liquidgemm {

// Logical tensors, row-major: qweight [n, k / 2] (column 2j in the low nibble of byte j), qscale
// and qoffset [n, k / 64].
struct LogicalWeight {
  uint8_t* qweight;
  uint8_t* qscale;
  uint8_t* qoffset;
  int64_t n;
  int64_t k_blocks;
};

inline constexpr int kPaddingOffset = kOffsetBias;  // rows past n decode to 0

CUTE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Packs row `row` (0..63) of one block. `block` points at its kBlockBytes. Returns whether every
// code is feasible.
CUTE_HOST_DEVICE bool pack_block_row(
    LogicalWeight const& logical, int64_t panel, int64_t k_block, int row, uint8_t* block) {
  const int64_t n = panel * kBlockRows + row;
  const bool inside = n < logical.n;
  const int64_t group = n * logical.k_blocks + k_block;
  const int step = inside ? logical.qscale[group] : 0;
  const int offset = inside ? logical.qoffset[group] : kPaddingOffset;
  uint8_t const* codes = logical.qweight + group * (kBlockK / 2);

  bool feasible = true;
  for (int k = 0; k < kMmaK; ++k) {  // k and k + 32 share a byte of the block
    const int pair_lo = inside ? codes[k / 2] : 0;
    const int pair_hi = inside ? codes[(k + kMmaK) / 2] : 0;
    const int code_lo = (pair_lo >> (4 * (k % 2))) & 0xf;
    const int code_hi = (pair_hi >> (4 * (k % 2))) & 0xf;
    feasible &= is_feasible(code_lo, step, offset) && is_feasible(code_hi, step, offset);
    block[code_position(row, k).byte] = static_cast<uint8_t>(code_lo | (code_hi << 4));
  }
  block[param_position(row)] = static_cast<uint8_t>(step);
  block[param_position(row) + 1] = static_cast<uint8_t>(offset);
  return feasible;
}

// The inverse of pack_block_row for rows inside n.
CUTE_HOST_DEVICE void unpack_block_row(
    uint8_t const* block, int64_t panel, int64_t k_block, int row, LogicalWeight const& logical) {
  const int64_t n = panel * kBlockRows + row;
  if (n >= logical.n)
    return;
  const int64_t group = n * logical.k_blocks + k_block;
  uint8_t* codes = logical.qweight + group * (kBlockK / 2);
  for (int j = 0; j < kBlockK / 2; ++j) {
    int pair = 0;
    for (int i = 0; i < 2; ++i) {
      const CodePosition p = code_position(row, 2 * j + i);
      pair |= ((block[p.byte] >> p.shift) & 0xf) << (4 * i);
    }
    codes[j] = static_cast<uint8_t>(pair);
  }
  logical.qscale[group] = block[param_position(row)];
  logical.qoffset[group] = block[param_position(row) + 1];
}

}  // namespace liquidgemm
