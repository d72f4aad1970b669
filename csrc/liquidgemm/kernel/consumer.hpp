// A consumer warp-group's main loop: LDS -> dequantize in registers -> wgmma.
//
// The A registers are double-buffered, and the loop waits for the multiplication before the last
// one only: block i + 1 is dequantized while the tensor cores multiply block i. Consumers
// synchronize with the loaders alone, never with one another.
//
//   dequantize   | 0 | 1 |   2 |   3 | ...         one k group that takes every stage
//   tensor cores     | 0     | 1     | 2 ...
//
// If k groups alternate, a group waits for its multiplications and releases its stage at once: the
// other groups compute meanwhile, and at few tokens the bytes in flight limit the speed. A group
// that takes every stage releases it after the first multiplication of the next one.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <utility>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/formats/a_operand.hpp"
#include "liquidgemm/kernel/load/tokens.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/ring.hpp"
#include "liquidgemm/kernel/storage.hpp"

namespace liquidgemm {

template <class Tile>
class Consumer {
  using Format = typename Tile::Format;
  using WeightReader = typename Format::Reader;
  using Weights = decltype(std::declval<WeightReader const&>().load(0));
  using Barrier = cutlass::arch::ClusterBarrier;

 public:
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::rs_op_selector<
          int8_t,
          int8_t,
          int32_t,
          cute::Shape<cute::_64, cute::Int<Tile::kTokens>, cute::Int<kMmaK>>>()));
  using TokenOperands = typename Tokens<Tile>::template Operands<Mma>;

  CUTE_DEVICE static auto make_accumulator() {
    return cute::partition_fragment_C(Mma{}, cute::Shape<cute::_64, cute::Int<Tile::kTokens>>{});
  }

  // Blocks of weights as A operands: (MMA, 1, k step of the block, block).
  template <int kBlocks>
  CUTE_DEVICE static auto make_weight_operands() {
    using namespace cute;
    return make_tensor<int8_t>(
        make_layout(make_shape(Shape<_4, _2, _2>{}, _1{}, _2{}, Int<kBlocks>{})));
  }

  CUTE_DEVICE Consumer(Sizes const& sizes, SharedStorage<Tile>& shared, int panel, int k_group)
      : sizes_(sizes), shared_(shared), panel_(panel), k_group_(k_group) {}

  // Adds this group's part of the stages `begin` to `end` of a tile to acc: those whose number,
  // counted from this CTA's first stage on, is k_group modulo kKGroups. The tile's stage 0 has the
  // number `stages_done`. `pair_rank` is the CTA whose ring the group's warps release, too, or
  // negative.
  template <class Accumulator>
  CUTE_DEVICE void multiply(
      int stages_done, int begin, int end, int pair_rank, Accumulator& acc) const {
    using namespace cute;
    const int thread = threadIdx.x % kWarpGroupThreads;
    Mma mma;
    const TokenOperands tokens(sizes_, shared_);
    auto tCrW = make_weight_operands<2>();  // double-buffered

    constexpr int kGroups = Tile::kKGroups;
    const int first = begin + (k_group_ + kGroups - stages_done % kGroups) % kGroups;
    RingState<Tile> ring(stages_done + first);
    const WeightReader reader(&shared_.weights[0][panel_][0], thread);
    // A group that takes every stage waits for the next stage before its last multiplications of
    // this one. The ring is ahead of the group, so that the wait is short and the next weights
    // arrive in time.
    constexpr bool kAlternates = kGroups > 1;
    Weights next{};
    if (!kAlternates && first < end)
      next = wait_and_load(reader, ring);
    for (int stage = first; stage < end; stage += kGroups) {
      const int slot = ring.slot;
      CUTE_UNROLL
      for (int block = 0; block < Tile::kStageBlocks; ++block) {
        if (kAlternates && block == 0)
          next = wait_and_load(reader, ring);
        const Weights weights = next;
        // The next block's load is in flight while this block is dequantized.
        if (block + 1 < Tile::kStageBlocks) {
          next = reader.load(offset(slot, block + 1));
        } else {
          ring.advance(kGroups);
          if (!kAlternates && stage + kGroups < end)
            next = wait_and_load(reader, ring);
        }
        Tensor tCrW_block = tCrW(_, _, _, block % 2);
        Format::dequantize(weights, recast<uint32_t>(tCrW_block));
        // Pins the registers here: arithmetic moved behind the arrive would make ptxas serialize
        // the wgmmas.
        warpgroup_fence_operand(tCrW_block);
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        gemm(mma, tCrW_block(_, _, 0), tokens(2 * block, slot, stage), acc);
        gemm(mma, tCrW_block(_, _, 1), tokens(2 * block + 1, slot, stage), acc);
        warpgroup_commit_batch();
        if (kAlternates && block + 1 == Tile::kStageBlocks) {
          warpgroup_wait<0>();
          release(slot, true, pair_rank);
        } else {
          // The block before this one is multiplied: its registers are free, and with the first
          // block of a stage so is the slot of the stage before.
          warpgroup_wait<1>();
          if (!kAlternates && block == 0)
            release(ring.behind(kGroups), stage != first, pair_rank);
        }
      }
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    if (!kAlternates)
      release(ring.behind(kGroups), end > first, pair_rank);
  }

  // Where a block of a slot begins, counted from the panel's first.
  CUTE_DEVICE static uint32_t offset(int slot, int block) {
    return slot * Tile::kStageWeightBytes + block * Format::kBlockBytes;
  }

  // Without a branch: ptxas serializes wgmmas whose pipeline crosses a divergent one.
  CUTE_DEVICE void release(int slot, bool condition, int pair_rank) const {
    __syncwarp();
    const bool arrives = condition && threadIdx.x % 32 < kReleasesPerWarp;
    arrive_if(arrives, &shared_.barriers.empty[slot]);
    if constexpr (Tile::kPairs)
      arrive_at_peer_if(arrives && pair_rank >= 0, &shared_.barriers.empty[slot], pair_rank);
  }

 private:
  CUTE_DEVICE Weights wait_and_load(WeightReader const& reader, RingState<Tile> const& ring) const {
    Barrier::wait(&shared_.barriers.full[ring.slot], ring.phase);
    return reader.load(offset(ring.slot, 0));
  }

  Sizes const& sizes_;
  SharedStorage<Tile>& shared_;
  int panel_, k_group_;
};

}  // namespace liquidgemm
