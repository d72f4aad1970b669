// The LiquidQuant weight format (arXiv 2509.01229, section 4), stated once for kernel, packer and
// tests.
//
//   W[n, k] ~= sigma[n] * w8,   w8 = q * s + lo,   q in 0..15,   lo = a - 128
//
// s ("step") and a ("offset") are bytes shared by a group of 64 weights along K of one output
// channel; sigma is one float per channel. a is stored biased by 128 so that q * s + a is an
// unsigned byte: multiplying and adding four such bytes inside one 32-bit word then never carries
// from one byte into the next, and flipping the top bit of each byte turns the biased byte into the
// signed one.
//
// A packed block has exactly one group per channel:
//
//   bytes    0..2047   16 bytes per thread of a warp-group: thread t owns bytes [16 t, 16 t + 16),
//                      read by one LDS.128. Of its four 32-bit words, word r holds A-operand
//                      register r of k step 0 in the low nibbles and of k step 1 in the high
//                      nibbles. `w & 0x0f0f0f0f` and `(w >> 4) & 0x0f0f0f0f` are therefore the two
//                      registers as they stand, and one (s, a) pair serves the whole word.
//   bytes 2048..2175   32 words (s[g], a[g], s[g + 8], a[g + 8]), one per channel pair (g, g + 8)
//                      that a thread's registers belong to: word 8 * warp + g, read by one LDS.32
//                      that broadcasts within a quad.
#pragma once

#include <cstdint>
#include <cstring>

#include "liquidgemm/common/bytes.hpp"
#include "liquidgemm/common/shared_address.hpp"
#include "liquidgemm/formats/format.hpp"
#include "liquidgemm/formats/logical_weight.hpp"

namespace liquidgemm {

struct LiquidQuant {
  static constexpr char kName[] = "liquidquant";

  // -----------------------------------------------------------------------------------------------
  // Numbers

  static constexpr int kGroupSize = 64;    // weights along K that share (s, a)
  static constexpr int kMaxCode = 15;      // largest 4-bit code
  static constexpr int kOffsetBias = 128;  // a = lo + 128

  // Four weights at a time: one multiply-add and one xor.
  //   codes    four 4-bit codes, one in the low nibble of each byte (high nibbles zero)
  //   step     s, zero-extended
  //   offsets  a, replicated to all four bytes
  // Returns four signed 8-bit weights. Exact if and only if q * s + a <= 255 for each of the four
  // codes.
  CUTE_HOST_DEVICE static constexpr uint32_t decode4(uint32_t codes,
                                                     uint32_t step,
                                                     uint32_t offsets) {
    return (codes * step + offsets) ^ 0x80808080u;
  }

  // One code of one group is representable.
  CUTE_HOST_DEVICE static constexpr bool is_feasible(int code, int step, int offset) {
    return code * step + offset <= 255;
  }

  // The largest code that is feasible: 0 always is.
  CUTE_HOST_DEVICE static constexpr int largest_feasible_code(int step, int offset) {
    int code = kMaxCode;
    while (!is_feasible(code, step, offset))
      --code;
    return code;
  }

  // -----------------------------------------------------------------------------------------------
  // Places in a block

  static constexpr int kCodeBytesPerThread = 16;
  static constexpr int kCodeBytes = kCodeBytesPerThread * kWarpGroupThreads;
  static_assert(kCodeBytes * 2 == kBlockRows * kBlockK && kBlockK == kGroupSize);
  static constexpr int kParamBytes = kBlockRows * 2;
  static constexpr int kBlockBytes = kCodeBytes + kParamBytes;

  struct CodePosition {
    int byte;   // within the block
    int shift;  // 0 or 4
  };

  // Where the code of (row, k), both in 0..63, lies in its block.
  CUTE_HOST_DEVICE static constexpr CodePosition code_position(int row, int k) {
    const OperandPosition at = operand_position(row, k);
    return {kCodeBytesPerThread * at.thread + at.value, 4 * at.step};
  }

  // Byte offset of s of a row within its block; a follows in the next byte.
  CUTE_HOST_DEVICE static constexpr int param_position(int row) {
    const OperandPosition at = operand_position(row, 0);
    const int row_half = at.value / 4;
    return kCodeBytes + 4 * (at.thread / 4) + 2 * row_half;
  }

  // Word of this thread's channel pair (g, g + 8) within the block's parameters.
  CUTE_HOST_DEVICE static constexpr int param_word(int thread) { return thread / 4; }

  // -----------------------------------------------------------------------------------------------
  // Kernel: from shared memory to A operands

  // One block of a thread's weights: 32 codes, and the (s, a) pairs of its two channels.
  struct Fragment {
    uint32_t codes[4];
    uint32_t params;
  };

  CUTE_HOST_DEVICE static Fragment fragment(uint8_t const* block, int thread) {
    Fragment f;
    memcpy(f.codes, block + kCodeBytesPerThread * thread, sizeof(f.codes));
    memcpy(&f.params, block + kCodeBytes + 4 * param_word(thread), sizeof(f.params));
    return f;
  }

  class Reader {
   public:
    CUTE_DEVICE Reader(uint8_t const* first_block, int thread)
        : codes_(shared_address(first_block) + kCodeBytesPerThread * thread),
          params_(shared_address(first_block) + kCodeBytes + 4 * param_word(thread)) {
      // Hides where they come from: ptxas would compute both anew for every block.
      asm volatile("" : "+r"(codes_), "+r"(params_));
    }

    // `offset`: bytes from the first block to the one to load.
    CUTE_DEVICE Fragment load(uint32_t offset) const {
      Fragment f;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(f.codes[0]), "=r"(f.codes[1]), "=r"(f.codes[2]), "=r"(f.codes[3])
                   : "r"(codes_ + offset));
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(f.params) : "r"(params_ + offset));
      return f;
    }

   private:
    uint32_t codes_, params_;
  };

  // Into 8 A registers: registers(r, 0, step), r in 0..3.
  template <class Registers>
  CUTE_HOST_DEVICE static void dequantize(Fragment const& f, Registers&& registers) {
    // (s, a) of channel g in the low half, of g + 8 in the high half: zero-extend s, replicate a.
    const uint32_t step[2] = {byte_perm(f.params, 0, 0x4440), byte_perm(f.params, 0, 0x4442)};
    const uint32_t offsets[2] = {byte_perm(f.params, 0, 0x1111), byte_perm(f.params, 0, 0x3333)};
    CUTE_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int half = r % 2;
      registers(r, 0, 0) = decode4(f.codes[r] & 0x0f0f0f0fu, step[half], offsets[half]);
      registers(r, 0, 1) = decode4((f.codes[r] >> 4) & 0x0f0f0f0fu, step[half], offsets[half]);
    }
  }

  // -----------------------------------------------------------------------------------------------
  // Packer: logical tensors <-> blocks

  using Logical = LogicalWeight;

  static constexpr int kPaddingOffset = kOffsetBias;  // rows past n decode to 0

  // One row (0..63) of a block, and where it lies there. Four neighbouring k share a 32-bit word,
  // as they share a register of the A operand, so that packing moves words instead of nibbles.
  struct Row {
    int row;
    int words[kMmaK / 4];  // bytes: k = 4 i .. 4 i + 3 in the low nibbles, k + 32 in the high
    int params;            // byte of s; a follows
  };

  CUTE_HOST_DEVICE static constexpr Row row(int row) {
    Row result{row, {}, param_position(row)};
    for (int i = 0; i < kMmaK / 4; ++i)
      result.words[i] = code_position(row, 4 * i).byte;
    return result;
  }

  // Packs one row of one block. `block` points at its kBlockBytes. Returns whether every code is
  // feasible.
  CUTE_HOST_DEVICE static bool pack_row(
      Logical const& logical, int64_t panel, int64_t k_block, Row const& at, uint8_t* block) {
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

  // The inverse of pack_row for rows inside n.
  CUTE_HOST_DEVICE static void unpack_row(
      uint8_t const* block, int64_t panel, int64_t k_block, Row const& at, Logical const& logical) {
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

  // Four nibbles to the low nibbles of four bytes, and back (the high nibbles are ignored).
  CUTE_HOST_DEVICE static constexpr uint32_t spread_nibbles(uint32_t nibbles) {
    const uint32_t pairs = (nibbles | nibbles << 8) & 0x00ff00ffu;
    return (pairs | pairs << 4) & 0x0f0f0f0fu;
  }
  CUTE_HOST_DEVICE static constexpr uint32_t gather_nibbles(uint32_t bytes) {
    const uint32_t codes = bytes & 0x0f0f0f0fu;
    const uint32_t pairs = (codes | codes >> 4) & 0x00ff00ffu;
    return (pairs | pairs >> 8) & 0xffffu;
  }
};

static_assert(WeightFormat<LiquidQuant>);

}  // namespace liquidgemm
