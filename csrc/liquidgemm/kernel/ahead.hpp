// The first stages of a CTA's first tile, dequantized before the tokens arrive. With programmatic
// dependent launch a CTA may have weights long before the previous kernel has finished the
// activations. The consumers then hold the operands in registers.
//
// Both functions are unrolled, since registers cannot be indexed.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "liquidgemm/kernel/consumer.hpp"
#include "liquidgemm/kernel/storage.hpp"

namespace liquidgemm {

template <class Tile>
class Ahead {
  using Barrier = cutlass::arch::ClusterBarrier;
  using Format = typename Tile::Format;

 public:
  CUTE_DEVICE static auto make_operands() {
    constexpr int kBlocks = Tile::kStagesAhead * Tile::kStageBlocks;
    return Consumer<Tile>::template make_weight_operands<kBlocks ? kBlocks : 1>();
  }

  CUTE_DEVICE Ahead(PrefetchParams const& params, SharedStorage<Tile>& shared, int k_group)
      : params_(params), shared_(shared), k_group_(k_group) {}

  template <class Operands>
  CUTE_DEVICE void dequantize(Operands& operands) const {
    using namespace cute;
    const typename Format::Reader reader(&shared_.weights[0][0][0],
                                         threadIdx.x % kWarpGroupThreads);
    CUTE_UNROLL
    for (int i = 0; i < Tile::kStagesAhead; ++i) {
      if (i == params_.stages_ahead)
        break;
      const int stage = i * Tile::kKGroups + k_group_;
      Barrier::wait(&shared_.barriers.ahead[stage], 0);
      CUTE_UNROLL
      for (int block = 0; block < Tile::kStageBlocks; ++block) {
        Tensor to = operands(_, _, _, i * Tile::kStageBlocks + block);
        Format::dequantize(reader.load(Consumer<Tile>::offset(stage, block)), recast<uint32_t>(to));
      }
    }
  }

  // Once the tokens have arrived.
  template <class Operands, class Accumulator>
  CUTE_DEVICE void multiply(Sizes const& sizes,
                            Consumer<Tile> const& consumer,
                            Operands& operands,
                            Accumulator& acc) const {
    using namespace cute;
    typename Consumer<Tile>::Mma mma;
    const typename Consumer<Tile>::TokenOperands tokens(sizes, shared_);
    warpgroup_fence_operand(operands);
    CUTE_UNROLL
    for (int i = 0; i < Tile::kStagesAhead; ++i) {
      if (i == params_.stages_ahead)
        break;
      const int slot = i * Tile::kKGroups + k_group_;
      Barrier::wait(&shared_.barriers.full[slot], 0);
      warpgroup_fence_operand(acc);
      warpgroup_arrive();
      CUTE_UNROLL
      for (int step = 0; step < 2 * Tile::kStageBlocks; ++step) {
        gemm(mma, operands(_, _, step % 2, i * Tile::kStageBlocks + step / 2),
             tokens(step, slot, slot), acc);
      }
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc);
      consumer.release(slot, true, -1);
    }
  }

 private:
  PrefetchParams const& params_;
  SharedStorage<Tile>& shared_;
  int k_group_;
};

}  // namespace liquidgemm
