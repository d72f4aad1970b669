// The INT8 weight format, stated once for kernel, packer and tests.
//
//   W[n, k] ~= sigma[n] * w8,   w8 in -128..127
//
// sigma is one float per channel. Nothing is decoded: a thread's bytes are its A operand.
//
// A packed block is two k steps of 2048 bytes. Thread t of a warp-group owns bytes [16 t, 16 t +
// 16) of both: its four registers of that step, read by one LDS.128 without bank conflicts.
#pragma once

#include <cstdint>
#include <cstring>

#include "liquidgemm/common/shared_address.hpp"
#include "liquidgemm/formats/format.hpp"
#include "liquidgemm/formats/logical_weight.hpp"

namespace liquidgemm {

struct Int8 {
  static constexpr char kName[] = "int8";

  // -----------------------------------------------------------------------------------------------
  // Places in a block

  static constexpr int kStepBytesPerThread = 16;
  static constexpr int kStepBytes = kStepBytesPerThread * kWarpGroupThreads;
  static constexpr int kBlockBytes = 2 * kStepBytes;
  static_assert(kBlockBytes == kBlockRows * kBlockK);

  // Where the weight of (row, k), both in 0..63, lies in its block.
  CUTE_HOST_DEVICE static constexpr int position(int row, int k) {
    const OperandPosition at = operand_position(row, k);
    return kStepBytes * at.step + kStepBytesPerThread * at.thread + at.value;
  }

  // -----------------------------------------------------------------------------------------------
  // Kernel: from shared memory to A operands

  // One block of a thread's weights. In the kernel a fragment is only where they lie, and the A
  // operand is loaded when it is needed: a copy of loaded registers is no instruction, and ptxas
  // serializes wgmmas whose operands are loaded while others run.
  struct Fragment {
    uint32_t steps[2][4];
  };

  CUTE_HOST_DEVICE static Fragment fragment(uint8_t const* block, int thread) {
    Fragment f;
    for (int step = 0; step < 2; ++step)
      memcpy(f.steps[step], block + kStepBytes * step + kStepBytesPerThread * thread,
             sizeof(f.steps[step]));
    return f;
  }

  struct SharedFragment {
    uint32_t address;
  };

  class Reader {
   public:
    CUTE_DEVICE Reader(uint8_t const* first_block, int thread)
        : weights_(shared_address(first_block) + kStepBytesPerThread * thread) {
      // Hides where it comes from: ptxas would compute it anew for every block.
      asm volatile("" : "+r"(weights_));
    }

    // `offset`: bytes from the first block to the one to load.
    CUTE_DEVICE SharedFragment load(uint32_t offset) const { return {weights_ + offset}; }

   private:
    uint32_t weights_;
  };

  // Into 8 A registers: registers(r, 0, step), r in 0..3.
  template <class Registers>
  CUTE_DEVICE static void dequantize(SharedFragment f, Registers&& registers) {
    CUTE_UNROLL
    for (int step = 0; step < 2; ++step)
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(registers(0, 0, step)), "=r"(registers(1, 0, step)),
                     "=r"(registers(2, 0, step)), "=r"(registers(3, 0, step))
                   : "r"(f.address + kStepBytes * step));
  }
  template <class Registers>
  CUTE_HOST_DEVICE static void dequantize(Fragment const& f, Registers&& registers) {
    CUTE_UNROLL
    for (int r = 0; r < 4; ++r) {
      registers(r, 0, 0) = f.steps[0][r];
      registers(r, 0, 1) = f.steps[1][r];
    }
  }

  // -----------------------------------------------------------------------------------------------
  // Packer: logical tensors <-> blocks

  using Logical = LogicalInt8Weight;

  // One row (0..63) of a block, and where it lies there: four neighbouring k are a word.
  struct Row {
    int row;
    int words[kBlockK / 4];
  };

  CUTE_HOST_DEVICE static constexpr Row row(int row) {
    Row result{row, {}};
    for (int i = 0; i < kBlockK / 4; ++i)
      result.words[i] = position(row, 4 * i);
    return result;
  }

  // Packs one row of one block; rows past n are 0. `block` points at its kBlockBytes. Every weight
  // is representable.
  CUTE_HOST_DEVICE static bool pack_row(
      Logical const& logical, int64_t panel, int64_t k_block, Row const& at, uint8_t* block) {
    const int64_t n = panel * kBlockRows + at.row;
    int8_t const* const from = logical.qweight + (n * logical.k_blocks + k_block) * kBlockK;
    for (int i = 0; i < kBlockK / 4; ++i) {
      for (int byte = 0; byte < 4; ++byte)
        block[at.words[i] + byte] = n < logical.n ? static_cast<uint8_t>(from[4 * i + byte]) : 0;
    }
    return true;
  }

  // The inverse of pack_row for rows inside n.
  CUTE_HOST_DEVICE static void unpack_row(
      uint8_t const* block, int64_t panel, int64_t k_block, Row const& at, Logical const& logical) {
    const int64_t n = panel * kBlockRows + at.row;
    if (n >= logical.n)
      return;
    int8_t* const to = logical.qweight + (n * logical.k_blocks + k_block) * kBlockK;
    for (int i = 0; i < kBlockK / 4; ++i) {
      for (int byte = 0; byte < 4; ++byte)
        to[4 * i + byte] = static_cast<int8_t>(block[at.words[i] + byte]);
    }
  }
};

static_assert(WeightFormat<Int8>);

}  // namespace liquidgemm
