// The packed layouts as the CPU reads them. The layouts themselves are formats/*.hpp; kernels.cpp
// asserts that both say the same. This header includes nothing else, because it is compiled once
// per instruction set (see simd.hpp).
//
// LiquidQuant: the 64 x 64 codes of a block are 32 chunks of 64 bytes. Chunk 8 b + g holds all
// codes of two rows, 16 b + g and 16 b + g + 8, as 16 words of four k each:
//
//   word        0        1        2         3         4        5       ...  15
//   row         g        g + 8    g         g + 8     g        g + 8
//   low nibble  k 0-3    0-3      16-19     16-19     4-7      4-7          28-31
//   high nibble k 32-35  32-35    48-51     48-51     36-39    36-39        60-63
//
// so that a 32-bit lane belongs to one row throughout: even lanes to row g, odd ones to row g + 8.
// The word (s[g], a[g], s[g + 8], a[g + 8]) of the chunk lies at Nibbles::kParams + 4 (8 b + g).
// The eight chunks of one b are a band: 16 rows.
//
// LiquidQuant6: the low six bits of a chunk are the codes of its low nibbles above. Of those of its
// high nibbles, words 0 and 1 of every four lie in the low six bits of half a chunk more, at
// SixBits::kSecond; words 2 and 3 in what remains: their bits 5 and 4 in the top bits of the
// chunk's words 0 and 1, bits 3 and 2 in those of its words 2 and 3, bits 1 and 0 in the half's.
//
// LiquidQuantG32: the chunks of LiquidQuant, with (s, a) of the low nibbles where its own are, and
// at Groups32::kHighParams those of the high ones.
//
// INT8: the same chunks twice, with a weight in place of a code: those of k 0-31, and at kHigh
// those of k 32-63.
#pragma once

#include <cstdint>

namespace liquidgemm::cpu {

inline constexpr int kGroup = 64;        // k per block: one (s, a) per row, or two
inline constexpr int kPanel = 64;        // rows per block
inline constexpr int kChunk = 64;        // bytes: two rows of one group
inline constexpr int kBand = 16;         // rows of eight chunks
inline constexpr int kBandChunks = 8;    // chunks per band
inline constexpr int kPanelBands = 4;    // bands per panel
inline constexpr int kPanelChunks = 32;  // chunks per block
inline constexpr int kHigh = kPanelChunks * kChunk;
inline constexpr int kArranged = 2 * kGroup;  // bytes of one token's group, arranged

struct Nibbles {  // of LiquidQuant
  static constexpr int kParams = kHigh;
  static constexpr int kBlock = kParams + 2 * kPanel;  // bytes
};
struct SixBits {  // of LiquidQuant6
  static constexpr int kSecond = kHigh;
  static constexpr int kParams = kSecond + kHigh / 2;
  static constexpr int kBlock = kParams + 2 * kPanel;
};
struct Groups32 {  // of LiquidQuantG32
  static constexpr int kParams = kHigh;
  static constexpr int kHighParams = kParams + 2 * kPanel;
  static constexpr int kBlock = kHighParams + 2 * kPanel;
};
struct Bytes {  // of INT8
  static constexpr int kBlock = 2 * kHigh;
};

// The first k of the four of a word, for its low nibbles; those of the high nibbles are 32 later.
constexpr int first_k(int word) {
  return 4 * (word / 4) + 16 * (word / 2 % 2);
}

// Bounds that let sums of products of codes stay in 16 bits. x = -128 is not a valid activation,
// but it must not overflow either.
inline constexpr int kLargestCode = 15, kLargestX = 128, kInt16Max = 32767;
inline constexpr int kLargestCode6 = 63;
static_assert(kGroup * kLargestX <= kInt16Max, "the sum of a group's x fits 16 bits");

}  // namespace liquidgemm::cpu
