// The packed weight layout, derived from the WGMMA A-operand layout that the kernel uses.
//
// A block is 64 output channels x 64 k: two m64k32 MMA steps, and exactly one quantization group
// per channel.
//
//   bytes    0..2047   16 bytes per thread of a warp-group: thread t owns bytes [16 t, 16 t + 16),
//   read by one LDS.128.
//                      Of its four 32-bit words, word r holds A-operand register r of k-step 0 in
//                      the low nibbles and of k-step 1 in the high nibbles. `w & 0x0f0f0f0f` and
//                      `(w >> 4) & 0x0f0f0f0f` are therefore the two registers as they stand, and
//                      one (s, a) pair serves the whole word.
//   bytes 2048..2175   32 words (s[g], a[g], s[g + 8], a[g + 8]), one per channel pair (g, g + 8)
//   that a thread's
//                      registers belong to: word 8 * warp + g, read by one LDS.32 that broadcasts
//                      within a quad.
//
// A panel is the blocks of 64 channels along K, contiguous, so that any run of blocks is one bulk
// copy: packed[panel][k_block][kBlockBytes].
#pragma once

#include <cstdint>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>

#include "liquidgemm/formats/format.hpp"

namespace liquidgemm {

inline constexpr int kBlockRows = 64;       // output channels per block: the M of wgmma
inline constexpr int kBlockK = kGroupSize;  // k per block
inline constexpr int kMmaK = 32;            // k of one 8-bit wgmma
inline constexpr int kWarpGroupThreads = 128;
inline constexpr int kCodeBytesPerThread = 16;
inline constexpr int kBlockCodeBytes = kCodeBytesPerThread * kWarpGroupThreads;
static_assert(kBlockCodeBytes * 2 == kBlockRows * kBlockK);
inline constexpr int kBlockParamBytes = kBlockRows * 2;
inline constexpr int kBlockBytes = kBlockCodeBytes + kBlockParamBytes;
static_assert(kBlockBytes % 16 == 0, "bulk copies move multiples of 16 bytes");

// (thread, value) -> row + 64 k of the A operand of one MMA step. A thread's 16 values are the 16
// bytes of its four registers in order, so the inverse gives a weight's place in memory directly.
using AOperandLayout =
    typename cute::MMA_Traits<cute::SM90::GMMA::MMA_64x8x32_S32S8S8_RS_TN>::ALayout;
using AOperandInverse = decltype(cute::right_inverse(AOperandLayout{}));

struct CodePosition {
  int byte;   // within the block
  int shift;  // 0 or 4
};

// Where the code of (row, k), both in 0..63, lies in its block.
CUTE_HOST_DEVICE constexpr CodePosition code_position(int row, int k) {
  const int thread_value = AOperandInverse{}(row + kBlockRows * (k % kMmaK));
  const int thread = thread_value % kWarpGroupThreads;
  const int value = thread_value / kWarpGroupThreads;
  return {kCodeBytesPerThread * thread + value, 4 * (k / kMmaK)};
}

// Byte offset of s of a row within its block; a follows in the next byte.
CUTE_HOST_DEVICE constexpr int param_position(int row) {
  const int thread_value = AOperandInverse{}(row);
  const int quad = thread_value % kWarpGroupThreads / 4;
  const int row_half = thread_value / kWarpGroupThreads / 4;
  return kBlockCodeBytes + 4 * quad + 2 * row_half;
}

// Word of this thread's channel pair (g, g + 8) within the block's parameters.
CUTE_HOST_DEVICE constexpr int param_word(int thread) {
  return thread / 4;
}

// The format as a template argument of the kernels.
struct LiquidQuant {
  static constexpr int kBlockBytes = liquidgemm::kBlockBytes;
};

}  // namespace liquidgemm
