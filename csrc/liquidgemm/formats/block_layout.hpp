// Blocks of weights, in the WGMMA A-operand layout that the kernel uses, for any code width.
//
// A block is 64 output channels x 64 k: two m64k32 MMA steps. A panel is the blocks of 64 channels
// along K, contiguous, so that any run of blocks is one bulk copy: packed[panel][k_block][bytes].
//
//   rows 0..63        -> 4 warps x 16 rows; thread t of warp t / 32 has rows g and g + 8 of its
//                        warp's, g = t % 32 / 4
//   k 0..31 of a step -> four neighbouring k share a register; register r of a thread has row
//                        g + 8 (r % 2) and k = 16 (r / 2) + 4 (t % 4) .. + 3
#pragma once

#include <cute/config.hpp>

namespace liquidgemm {

inline constexpr int kBlockRows = 64;  // output channels per block: the M of wgmma
inline constexpr int kBlockK = 64;     // k per block
inline constexpr int kMmaK = 32;       // k of one 8-bit wgmma
inline constexpr int kWarpGroupThreads = 128;

// Which thread holds (row, k) of a block, and as which of its values: those of k step 1 follow
// those of k step 0. a_operand.hpp asserts that it is CuTe's layout; this header is without CuTe's,
// which take longer to compile than most of what needs a block's layout.
struct OperandPosition {
  int thread;
  int step;   // 0 or 1
  int value;  // 0..15: byte value % 4 of register value / 4
};

CUTE_HOST_DEVICE constexpr OperandPosition operand_position(int row, int k) {
  const int warp = row / 16, row_half = row / 8 % 2, g = row % 8;
  const int step = k / kMmaK, k_half = k / 16 % 2, quad_thread = k / 4 % 4;
  return {32 * warp + 4 * g + quad_thread, step, 8 * k_half + 4 * row_half + k % 4};
}

// The inverse: row + kBlockRows * k, of k step 0.
CUTE_HOST_DEVICE constexpr int block_position(int thread, int value) {
  const int quad = thread / 4, quad_thread = thread % 4;
  const int warp = quad / 8, g = quad % 8;
  const int word = value / 4, byte = value % 4;
  const int k_half = word / 2, row_half = word % 2;
  return (quad_thread * (4 * kBlockRows) + (g + warp * 16)) +
         (byte * kBlockRows + (row_half * 8 + k_half * (16 * kBlockRows)));
}

}  // namespace liquidgemm
