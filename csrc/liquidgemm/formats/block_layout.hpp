// Blocks of weights, derived from the WGMMA A-operand layout that the kernel uses, for any code
// width.
//
// A block is 64 output channels x 64 k: two m64k32 MMA steps. A panel is the blocks of 64 channels
// along K, contiguous, so that any run of blocks is one bulk copy: packed[panel][k_block][bytes].
//
//   rows 0..63        -> 4 warps x 16 rows; thread t of warp t / 32 has rows g and g + 8 of its
//                        warp's, g = t % 32 / 4
//   k 0..31 of a step -> four neighbouring k share a register; register r of a thread has row
//                        g + 8 (r % 2) and k = 16 (r / 2) + 4 (t % 4) .. + 3
#pragma once

#include <cstdint>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>

namespace liquidgemm {

inline constexpr int kBlockRows = 64;  // output channels per block: the M of wgmma
inline constexpr int kBlockK = 64;     // k per block
inline constexpr int kMmaK = 32;       // k of one 8-bit wgmma
inline constexpr int kWarpGroupThreads = 128;

// (thread, value) -> row + 64 k of the A operand of one MMA step. A thread's 16 values are the 16
// bytes of its four registers in order, so the inverse gives a weight's place in memory directly.
using AOperandLayout =
    typename cute::MMA_Traits<cute::SM90::GMMA::MMA_64x8x32_S32S8S8_RS_TN>::ALayout;
using AOperandInverse = decltype(cute::right_inverse(AOperandLayout{}));

// Which thread holds (row, k) of a block, and as which of its values: those of k step 1 follow
// those of k step 0.
struct OperandPosition {
  int thread;
  int step;   // 0 or 1
  int value;  // 0..15: byte value % 4 of register value / 4
};

CUTE_HOST_DEVICE constexpr OperandPosition operand_position(int row, int k) {
  const int thread_value = AOperandInverse{}(row + kBlockRows * (k % kMmaK));
  return {thread_value % kWarpGroupThreads, k / kMmaK, thread_value / kWarpGroupThreads};
}

}  // namespace liquidgemm
