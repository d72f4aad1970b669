// LiquidQuant with codes of 6 bits, stated once for kernel, packer and tests.
//
//   W[n, k] ~= sigma[n] * w8,   w8 = q * s + lo,   q in 0..63,   lo = a - 128
//
// s, a and sigma are those of liquidquant.hpp. Three codes of a byte's low bits lie in three bytes,
// and a fourth one in what they have left, two bits each: no code crosses a byte of a word, and of
// four registers of the A operand three are masks of what has been loaded.
//
// A packed block has exactly one group per channel. Thread t of a warp-group has the k
// 16 j + 4 (t % 4) .. + 3, j in 0..3, of two channels, h = 0 for g and 1 for g + 8; j = 0 and 1
// are registers h and h + 2 of k step 0, 2 and 3 those of k step 1. Four k share a word:
//
//   bytes    0..2047   16 bytes per thread, read by one LDS.128: word h has j = 0 in its bytes' low
//                      six bits, word h + 2 has j = 1
//   bytes 2048..3071   8 bytes per thread, read by one LDS.64: word h has j = 2
//                      j = 3 is in the two top bits of all three: its bits 5 and 4, 3 and 2, 1 and
//                      0
//   bytes 3072..3199   32 words (s[g], a[g], s[g + 8], a[g + 8]), as in liquidquant.hpp
#pragma once

#include <cstdint>
#include <cstring>

#include "liquidgemm/common/bytes.hpp"
#include "liquidgemm/common/shared_address.hpp"
#include "liquidgemm/formats/format.hpp"
#include "liquidgemm/formats/liquidquant.hpp"
#include "liquidgemm/formats/logical_weight.hpp"

namespace liquidgemm {

struct LiquidQuant6 {
  static constexpr char kName[] = "liquidquant6";

  // -----------------------------------------------------------------------------------------------
  // Numbers

  static constexpr int kMaxCode = 63;

  // The largest code that is feasible: 0 always is.
  CUTE_HOST_DEVICE static constexpr int largest_feasible_code(int step, int offset) {
    int code = kMaxCode;
    while (!LiquidQuant::is_feasible(code, step, offset))
      --code;
    return code;
  }

  // -----------------------------------------------------------------------------------------------
  // Places in a block

  static constexpr int kFirstBytesPerThread = 16, kSecondBytesPerThread = 8;
  static constexpr int kFirstBytes = kFirstBytesPerThread * kWarpGroupThreads;
  static constexpr int kCodeBytes = kFirstBytes + kSecondBytesPerThread * kWarpGroupThreads;
  static_assert(kCodeBytes * 8 == kBlockRows * kBlockK * 6);
  static constexpr int kParamBytes = kBlockRows * 2;
  static constexpr int kBlockBytes = kCodeBytes + kParamBytes;

  static constexpr int kWordsOfThree = 3;  // that four words of codes take

  // Where word i of the three lies that hold k 16 j + 4 quad .. + 3 of a row for every j.
  CUTE_HOST_DEVICE static constexpr int word_position(int row, int quad, int i) {
    const OperandPosition at = operand_position(row, 4 * quad);
    const int half = at.value / 4;
    return i < 2 ? kFirstBytesPerThread * at.thread + 4 * (half + 2 * i)
                 : kFirstBytes + kSecondBytesPerThread * at.thread + 4 * half;
  }

  // Byte offset of s of a row within its block; a follows in the next byte.
  CUTE_HOST_DEVICE static constexpr int param_position(int row) {
    return kCodeBytes - LiquidQuant::kCodeBytes + LiquidQuant::param_position(row);
  }

  // Four words of codes, one per byte, to three; and the fourth from them.
  CUTE_HOST_DEVICE static constexpr uint32_t fourth(uint32_t w0, uint32_t w1, uint32_t w2) {
    return ((w0 >> 2) & 0x30303030u) | ((w1 >> 4) & 0x0c0c0c0cu) | ((w2 >> 6) & 0x03030303u);
  }
  CUTE_HOST_DEVICE static constexpr uint32_t with_bits_of_fourth(uint32_t codes,
                                                                 uint32_t fourth,
                                                                 int i) {
    return codes | ((fourth << (2 + 2 * i)) & 0xc0c0c0c0u);
  }

  // -----------------------------------------------------------------------------------------------
  // Kernel: from shared memory to A operands

  // One block of a thread's weights: 32 codes, and the (s, a) pairs of its two channels.
  struct Fragment {
    uint32_t codes[6];
    uint32_t params;
  };

  CUTE_HOST_DEVICE static Fragment fragment(uint8_t const* block, int thread) {
    Fragment f;
    memcpy(f.codes, block + kFirstBytesPerThread * thread, kFirstBytesPerThread);
    memcpy(f.codes + 4, block + kFirstBytes + kSecondBytesPerThread * thread,
           kSecondBytesPerThread);
    memcpy(&f.params, block + kCodeBytes + 4 * LiquidQuant::param_word(thread), sizeof(f.params));
    return f;
  }

  class Reader {
   public:
    CUTE_DEVICE Reader(uint8_t const* first_block, int thread)
        : first_(shared_address(first_block) + kFirstBytesPerThread * thread),
          second_(shared_address(first_block) + kFirstBytes + kSecondBytesPerThread * thread),
          params_(shared_address(first_block) + kCodeBytes + 4 * LiquidQuant::param_word(thread)) {
      // Hides where they come from: ptxas would compute all anew for every block.
      asm volatile("" : "+r"(first_), "+r"(second_), "+r"(params_));
    }

    // `offset`: bytes from the first block to the one to load.
    CUTE_DEVICE Fragment load(uint32_t offset) const {
      Fragment f;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(f.codes[0]), "=r"(f.codes[1]), "=r"(f.codes[2]), "=r"(f.codes[3])
                   : "r"(first_ + offset));
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(f.codes[4]), "=r"(f.codes[5])
                   : "r"(second_ + offset));
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(f.params) : "r"(params_ + offset));
      return f;
    }

   private:
    uint32_t first_, second_, params_;
  };

  // Into 8 A registers: registers(r, 0, step), r in 0..3.
  template <class Registers>
  CUTE_HOST_DEVICE static void dequantize(Fragment const& f, Registers&& registers) {
    // (s, a) of channel g in the low half, of g + 8 in the high half: zero-extend s, replicate a.
    const uint32_t step[2] = {byte_perm(f.params, 0, 0x4440), byte_perm(f.params, 0, 0x4442)};
    const uint32_t offsets[2] = {byte_perm(f.params, 0, 0x1111), byte_perm(f.params, 0, 0x3333)};
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const auto decode = [&](uint32_t codes) {
        return LiquidQuant::decode4(codes, step[h], offsets[h]);
      };
      const uint32_t w0 = f.codes[h], w1 = f.codes[h + 2], w2 = f.codes[h + 4];
      registers(h, 0, 0) = decode(w0 & 0x3f3f3f3fu);
      registers(h + 2, 0, 0) = decode(w1 & 0x3f3f3f3fu);
      registers(h, 0, 1) = decode(w2 & 0x3f3f3f3fu);
      registers(h + 2, 0, 1) = decode(fourth(w0, w1, w2));
    }
  }

  // -----------------------------------------------------------------------------------------------
  // Packer: logical tensors <-> blocks

  using Logical = LogicalWeight6;

  static constexpr int kLogicalGroupBytes = kBlockK * 6 / 8;

  // One row (0..63) of a block, and where it lies there.
  struct Row {
    int row;
    int words[4][kWordsOfThree];  // bytes, by k % 16 / 4
    int params;                   // byte of s; a follows
  };

  CUTE_HOST_DEVICE static constexpr Row row(int row) {
    Row result{row, {}, param_position(row)};
    for (int quad = 0; quad < 4; ++quad) {
      for (int i = 0; i < kWordsOfThree; ++i)
        result.words[quad][i] = word_position(row, quad, i);
    }
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
    const int offset = inside ? logical.qoffset[group] : LiquidQuant::kPaddingOffset;
    uint8_t const* const codes = logical.qweight + group * kLogicalGroupBytes;

    // Adding this to four codes at a time sets the top bit of those that are too large.
    const uint32_t headroom = 0x01010101u * (0x7f - largest_feasible_code(step, offset));
    uint32_t too_large = 0;
    for (int quad = 0; quad < 4; ++quad) {
      uint32_t of[4] = {};
      for (int j = 0; inside && j < 4; ++j)
        of[j] = spread(codes + 3 * (4 * j + quad));
      for (int j = 0; j < 4; ++j)
        too_large |= of[j] + headroom;
      for (int i = 0; i < kWordsOfThree; ++i) {
        const uint32_t word = with_bits_of_fourth(of[i], of[3], i);
        for (int byte = 0; byte < 4; ++byte)
          block[at.words[quad][i] + byte] = static_cast<uint8_t>(word >> (8 * byte));
      }
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
    uint8_t* const codes = logical.qweight + group * kLogicalGroupBytes;
    for (int quad = 0; quad < 4; ++quad) {
      uint32_t of[kWordsOfThree] = {};
      for (int i = 0; i < kWordsOfThree; ++i) {
        for (int byte = 0; byte < 4; ++byte)
          of[i] |= uint32_t(block[at.words[quad][i] + byte]) << (8 * byte);
      }
      for (int i = 0; i < kWordsOfThree; ++i)
        gather(of[i], codes + 3 * (4 * i + quad));
      gather(fourth(of[0], of[1], of[2]), codes + 3 * (12 + quad));
    }
    logical.qscale[group] = block[at.params];
    logical.qoffset[group] = block[at.params + 1];
  }

 private:
  // Four codes, the first one in the lowest bits of three bytes, to a byte each, and back (the top
  // bits of each byte are ignored).
  CUTE_HOST_DEVICE static constexpr uint32_t spread(uint8_t const* codes) {
    const uint32_t bits = uint32_t(codes[0]) | uint32_t(codes[1]) << 8 | uint32_t(codes[2]) << 16;
    return (bits & 0x3f) | (bits << 2 & 0x3f00) | (bits << 4 & 0x3f0000) | (bits << 6 & 0x3f000000);
  }
  CUTE_HOST_DEVICE static constexpr void gather(uint32_t word, uint8_t* codes) {
    const uint32_t bits =
        (word & 0x3f) | (word & 0x3f00) >> 2 | (word & 0x3f0000) >> 4 | (word & 0x3f000000) >> 6;
    for (int byte = 0; byte < 3; ++byte)
      codes[byte] = static_cast<uint8_t>(bits >> (8 * byte));
  }
};

static_assert(WeightFormat<LiquidQuant6>);

}  // namespace liquidgemm
