// Logical <-> packed weights, one block at a time; the same code runs on the host and on the GPU.
#pragma once

#include <cstdint>

#include "liquidgemm/formats/logical_weight.hpp"
#include "liquidgemm/formats/packed_layout.hpp"

namespace liquidgemm {

inline constexpr int kPaddingOffset = kOffsetBias;  // rows past n decode to 0

// One row (0..63) of a block, and where it lies there. Four neighbouring k share a 32-bit word, as
// they share a register of the A operand, so that packing moves words instead of nibbles.
struct BlockRow {
  int row;
  int words[kMmaK / 4];  // byte offsets: k = 4 i .. 4 i + 3 in the low nibbles, k + 32 in the high
  int params;            // byte offset of s; a follows
};

CUTE_HOST_DEVICE constexpr BlockRow block_row(int row) {
  BlockRow result{row, {}, param_position(row)};
  for (int i = 0; i < kMmaK / 4; ++i)
    result.words[i] = code_position(row, 4 * i).byte;
  return result;
}

// Four nibbles to the low nibbles of four bytes, and back (the high nibbles are ignored).
CUTE_HOST_DEVICE constexpr uint32_t spread_nibbles(uint32_t nibbles) {
  const uint32_t pairs = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (pairs | pairs << 4) & 0x0f0f0f0fu;
}
CUTE_HOST_DEVICE constexpr uint32_t gather_nibbles(uint32_t bytes) {
  const uint32_t codes = bytes & 0x0f0f0f0fu;
  const uint32_t pairs = (codes | codes >> 4) & 0x00ff00ffu;
  return (pairs | pairs >> 8) & 0xffffu;
}

// The largest code that is feasible: 0 always is.
CUTE_HOST_DEVICE constexpr int largest_feasible_code(int step, int offset) {
  int code = kMaxCode;
  while (!is_feasible(code, step, offset))
    --code;
  return code;
}

// Packs one row of one block. `block` points at its kBlockBytes. Returns whether every code is
// feasible.
CUTE_HOST_DEVICE bool pack_block_row(LogicalWeight const& logical,
                                     int64_t panel,
                                     int64_t k_block,
                                     BlockRow const& at,
                                     uint8_t* block) {
  const int64_t n = panel * kBlockRows + at.row;
  const bool inside = n < logical.n;
  const int64_t group = inside ? n * logical.k_blocks + k_block : 0;
  const int step = inside ? logical.qscale[group] : 0;
  const int offset = inside ? logical.qoffset[group] : kPaddingOffset;
  uint8_t const* const codes = logical.qweight + group * (kBlockK / 2);

  // Adding this to four codes at a time sets the top bit of those that are too large.
  const uint32_t headroom = 0x01010101u * (0x7f - largest_feasible_code(step, offset));
  uint32_t too_large = 0;
  for (int i = 0; i < kMmaK / 4; ++i) {
    uint8_t const* const lo = codes + 2 * i;
    uint8_t const* const hi = lo + kMmaK / 2;
    const uint32_t codes_lo = inside ? spread_nibbles(lo[0] | lo[1] << 8) : 0;
    const uint32_t codes_hi = inside ? spread_nibbles(hi[0] | hi[1] << 8) : 0;
    too_large |= (codes_lo + headroom) | (codes_hi + headroom);
    const uint32_t word = codes_lo | codes_hi << 4;
    for (int byte = 0; byte < 4; ++byte)
      block[at.words[i] + byte] = static_cast<uint8_t>(word >> (8 * byte));
  }
  block[at.params] = static_cast<uint8_t>(step);
  block[at.params + 1] = static_cast<uint8_t>(offset);
  return (too_large & 0x80808080u) == 0;
}

// The inverse of pack_block_row for rows inside n.
CUTE_HOST_DEVICE void unpack_block_row(uint8_t const* block,
                                       int64_t panel,
                                       int64_t k_block,
                                       BlockRow const& at,
                                       LogicalWeight const& logical) {
  const int64_t n = panel * kBlockRows + at.row;
  if (n >= logical.n)
    return;
  const int64_t group = n * logical.k_blocks + k_block;
  uint8_t* const codes = logical.qweight + group * (kBlockK / 2);
  for (int i = 0; i < kMmaK / 4; ++i) {
    uint8_t const* const b = block + at.words[i];
    const uint32_t word =
        uint32_t(b[0]) | uint32_t(b[1]) << 8 | uint32_t(b[2]) << 16 | uint32_t(b[3]) << 24;
    uint8_t* const lo = codes + 2 * i;
    uint8_t* const hi = lo + kMmaK / 2;
    const uint32_t codes_lo = gather_nibbles(word);
    const uint32_t codes_hi = gather_nibbles(word >> 4);
    for (int byte = 0; byte < 2; ++byte) {
      lo[byte] = static_cast<uint8_t>(codes_lo >> (8 * byte));
      hi[byte] = static_cast<uint8_t>(codes_hi >> (8 * byte));
    }
  }
  logical.qscale[group] = block[at.params];
  logical.qoffset[group] = block[at.params + 1];
}

}  // namespace liquidgemm
