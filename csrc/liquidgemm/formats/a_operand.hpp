// The A operand of one MMA step as CuTe has it, and that block_layout.hpp says the same.
#pragma once

#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "liquidgemm/formats/block_layout.hpp"

namespace liquidgemm {

// (thread, value) -> row + 64 k. A thread's 16 values are the 16 bytes of its four registers in
// order.
using AOperandLayout =
    typename cute::MMA_Traits<cute::SM90::GMMA::MMA_64x8x32_S32S8S8_RS_TN>::ALayout;

constexpr bool blocks_are_a_operands() {
  for (int thread = 0; thread < kWarpGroupThreads; ++thread) {
    for (int value = 0; value < 16; ++value) {
      const int row_k = block_position(thread, value);
      if (AOperandLayout{}(thread, value) != row_k)
        return false;
      for (int step = 0; step < kBlockK / kMmaK; ++step) {
        const OperandPosition at =
            operand_position(row_k % kBlockRows, row_k / kBlockRows + step * kMmaK);
        if (at.thread != thread || at.value != value || at.step != step)
          return false;
      }
    }
  }
  return true;
}
static_assert(blocks_are_a_operands());

}  // namespace liquidgemm
