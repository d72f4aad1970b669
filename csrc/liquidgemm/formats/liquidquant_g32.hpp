// LiquidQuant with groups of 32, stated once for kernel, packer and tests.
//
//   W[n, k] ~= sigma[n] * w8,   w8 = q * s + lo,   q in 0..15,   lo = a - 128
//
// as in liquidquant.hpp, but s and a are shared by 32 weights along K of one output channel.
//
// A packed block has two groups per channel. The low nibbles of a block's codes are those of k step
// 0, its first 32 columns, and the high ones those of k step 1: each step has a pair (s, a) of its
// own, and the codes stay where they are.
//
//   bytes    0..2047   codes, as in liquidquant.hpp
//   bytes 2048..2175   32 words (s[g], a[g], s[g + 8], a[g + 8]), likewise, of k step 0
//   bytes 2176..2303   the same of k step 1
#pragma once

#include <cstdint>
#include <cstring>

#include "liquidgemm/common/bytes.hpp"
#include "liquidgemm/common/shared_address.hpp"
#include "liquidgemm/formats/format.hpp"
#include "liquidgemm/formats/liquidquant.hpp"
#include "liquidgemm/formats/logical_weight.hpp"

namespace liquidgemm {

struct LiquidQuantG32 {
  static constexpr char kName[] = "liquidquant_g32";

  // -----------------------------------------------------------------------------------------------
  // Numbers

  static constexpr int kGroupSize = kMmaK;  // weights along K that share (s, a)
  static constexpr int kGroups = kBlockK / kGroupSize;
  static_assert(kGroups == 2);
  static constexpr int kMaxCode = LiquidQuant::kMaxCode;

  // -----------------------------------------------------------------------------------------------
  // Places in a block

  static constexpr int kCodeBytes = LiquidQuant::kCodeBytes;
  static constexpr int kParamBytes = LiquidQuant::kParamBytes;  // of a k step
  static constexpr int kBlockBytes = kCodeBytes + kGroups * kParamBytes;

  // Byte offset of s of a row and k step within its block; a follows in the next byte.
  CUTE_HOST_DEVICE static constexpr int param_position(int row, int step) {
    return LiquidQuant::param_position(row) + step * kParamBytes;
  }

  // -----------------------------------------------------------------------------------------------
  // Kernel: from shared memory to A operands

  // One block of a thread's weights: 32 codes, and of each k step the (s, a) pairs of its two
  // channels.
  struct Fragment {
    uint32_t codes[4];
    uint32_t params[kGroups];
  };

  CUTE_HOST_DEVICE static Fragment fragment(uint8_t const* block, int thread) {
    const LiquidQuant::Fragment first = LiquidQuant::fragment(block, thread);
    Fragment f;
    memcpy(f.codes, first.codes, sizeof(f.codes));
    f.params[0] = first.params;
    memcpy(&f.params[1], block + kCodeBytes + kParamBytes + 4 * LiquidQuant::param_word(thread),
           sizeof(f.params[1]));
    return f;
  }

  class Reader {
   public:
    CUTE_DEVICE Reader(uint8_t const* first_block, int thread)
        : codes_(shared_address(first_block) + LiquidQuant::kCodeBytesPerThread * thread),
          params_(shared_address(first_block) + kCodeBytes + 4 * LiquidQuant::param_word(thread)) {
      // Hides where they come from: ptxas would compute both anew for every block.
      asm volatile("" : "+r"(codes_), "+r"(params_));
    }

    // `offset`: bytes from the first block to the one to load.
    CUTE_DEVICE Fragment load(uint32_t offset) const {
      Fragment f;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(f.codes[0]), "=r"(f.codes[1]), "=r"(f.codes[2]), "=r"(f.codes[3])
                   : "r"(codes_ + offset));
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(f.params[0]) : "r"(params_ + offset));
      asm volatile("ld.shared.u32 %0, [%1 + %2];"
                   : "=r"(f.params[1])
                   : "r"(params_ + offset), "n"(kParamBytes));
      return f;
    }

   private:
    uint32_t codes_, params_;
  };

  // Into 8 A registers: registers(r, 0, step), r in 0..3.
  template <class Registers>
  CUTE_HOST_DEVICE static void dequantize(Fragment const& f, Registers&& registers) {
    CUTE_UNROLL
    for (int k_step = 0; k_step < kGroups; ++k_step) {
      // (s, a) of channel g in the low half, of g + 8 in the high half: zero-extend s, replicate a.
      const uint32_t params = f.params[k_step];
      const uint32_t step[2] = {byte_perm(params, 0, 0x4440), byte_perm(params, 0, 0x4442)};
      const uint32_t offsets[2] = {byte_perm(params, 0, 0x1111), byte_perm(params, 0, 0x3333)};
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) {
        const uint32_t codes = (f.codes[r] >> (4 * k_step)) & 0x0f0f0f0fu;
        registers(r, 0, k_step) = LiquidQuant::decode4(codes, step[r % 2], offsets[r % 2]);
      }
    }
  }

  // -----------------------------------------------------------------------------------------------
  // Packer: logical tensors <-> blocks

  using Logical = LogicalWeightG32;

  // One row (0..63) of a block, and where it lies there.
  struct Row {
    int row;
    int words[kMmaK / 4];  // as of LiquidQuant
    int params[kGroups];   // byte of s; a follows
  };

  CUTE_HOST_DEVICE static constexpr Row row(int row) {
    const LiquidQuant::Row like = LiquidQuant::row(row);
    Row result{row, {}, {param_position(row, 0), param_position(row, 1)}};
    for (int i = 0; i < kMmaK / 4; ++i)
      result.words[i] = like.words[i];
    return result;
  }

  // Packs one row of one block. `block` points at its kBlockBytes. Returns whether every code is
  // feasible.
  CUTE_HOST_DEVICE static bool pack_row(
      Logical const& logical, int64_t panel, int64_t k_block, Row const& at, uint8_t* block) {
    const int64_t n = panel * kBlockRows + at.row;
    const bool inside = n < logical.n;
    const int64_t of_row = inside ? n * logical.k_blocks + k_block : 0;
    uint8_t const* const codes = logical.qweight + of_row * (kBlockK / 2);

    // Adding this to four codes at a time sets the top bit of those that are too large.
    uint32_t headroom[kGroups], too_large = 0;
    for (int g = 0; g < kGroups; ++g) {
      const int64_t group = kGroups * of_row + g;
      const int step = inside ? logical.qscale[group] : 0;
      const int offset = inside ? logical.qoffset[group] : LiquidQuant::kPaddingOffset;
      headroom[g] = 0x01010101u * (0x7f - LiquidQuant::largest_feasible_code(step, offset));
      block[at.params[g]] = static_cast<uint8_t>(step);
      block[at.params[g] + 1] = static_cast<uint8_t>(offset);
    }
    for (int i = 0; i < kMmaK / 4; ++i) {
      uint32_t word = 0;
      for (int g = 0; inside && g < kGroups; ++g) {
        uint8_t const* const four = codes + g * kGroupSize / 2 + 2 * i;
        const uint32_t spread = LiquidQuant::spread_nibbles(four[0] | four[1] << 8);
        too_large |= spread + headroom[g];
        word |= spread << (4 * g);
      }
      for (int byte = 0; byte < 4; ++byte)
        block[at.words[i] + byte] = static_cast<uint8_t>(word >> (8 * byte));
    }
    return (too_large & 0x80808080u) == 0;
  }

  // The inverse of pack_row for rows inside n.
  CUTE_HOST_DEVICE static void unpack_row(
      uint8_t const* block, int64_t panel, int64_t k_block, Row const& at, Logical const& logical) {
    const int64_t n = panel * kBlockRows + at.row;
    if (n >= logical.n)
      return;
    const int64_t of_row = n * logical.k_blocks + k_block;
    uint8_t* const codes = logical.qweight + of_row * (kBlockK / 2);
    for (int i = 0; i < kMmaK / 4; ++i) {
      uint32_t word = 0;
      for (int byte = 0; byte < 4; ++byte)
        word |= uint32_t(block[at.words[i] + byte]) << (8 * byte);
      for (int g = 0; g < kGroups; ++g) {
        const uint32_t nibbles = LiquidQuant::gather_nibbles(word >> (4 * g));
        uint8_t* const four = codes + g * kGroupSize / 2 + 2 * i;
        four[0] = static_cast<uint8_t>(nibbles);
        four[1] = static_cast<uint8_t>(nibbles >> 8);
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      logical.qscale[kGroups * of_row + g] = block[at.params[g]];
      logical.qoffset[kGroups * of_row + g] = block[at.params[g] + 1];
    }
  }
};

static_assert(WeightFormat<LiquidQuantG32>);

}  // namespace liquidgemm
