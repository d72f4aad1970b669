// How a warp-group multiplies: one main loop per variant of ablation.hpp.
#pragma once

#include "ablation_load.hpp"

namespace ablation {

// The main loops: each adds one group's share of a tile to acc.
template <class C>
struct MainLoop {
  static constexpr int kSteps = 2 * C::kStageBlocks;

  Shared<C>& shared;
  int worker, panel, k_group;
  int thread = threadIdx.x % kWarpGroupThreads;

  CUTE_DEVICE auto tokens() const {
    using namespace cute;
    Tensor sX = make_tensor(make_smem_ptr(&shared.tokens[0][0]), typename C::TokenLayout{});
    auto thread_mma = typename C::Mma{}.get_thread_slice(thread);
    return thread_mma.make_fragment_B(thread_mma.partition_B(sX));  // (MMA, 1, k step, slot)
  }

  // Baseline and lqq: dequantize a stage, meet, multiply it, meet.
  template <class Accumulator>
  CUTE_DEVICE void in_turn(int stages_done, int slabs, Accumulator& acc) const {
    using namespace cute;
    typename C::Mma mma;
    Tensor tCrX = tokens();
    Tensor tCrW =
        make_tensor<int8_t>(make_layout(make_shape(Shape<_4, _2, _2>{}, _1{}, Int<kSteps>{})));
    auto registers = recast<uint32_t>(tCrW);
    const int rounds = (slabs + C::kKGroups - 1) / C::kKGroups;
    Cursor<C> at(stages_done, k_group);
    for (int round = 0; round < rounds; ++round, at.advance()) {
      const bool mine = at.slab < slabs;
      if (mine) {
        Barrier::wait(&shared.full[at.slot()], at.phase());
        CUTE_UNROLL
        for (int block = 0; block < C::kStageBlocks; ++block) {
          uint32_t weights[8];
          dequantize<C>(shared.weights[at.slot()][panel] + block * LiquidQuant::kBlockBytes, thread,
                        weights);
          CUTE_UNROLL
          for (int r = 0; r < 8; ++r)
            registers(r % 4, 0, 2 * block + r / 4) = weights[r];
        }
      }
      meet(C::kMmaThreads, kDequantized);
      if (mine) {
        warpgroup_fence_operand(tCrW);
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int step = 0; step < kSteps; ++step)
          gemm(mma, tCrW(_, _, step), tCrX(_, _, step, at.slot()), acc);
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(acc);
        warp_arrive(&shared.empty[at.slot()]);
      }
      meet(C::kMmaThreads, kMultiplied);
    }
  }

  // ImFP: two A buffers; a block is dequantized under the multiplication of the one before.
  template <class Accumulator>
  CUTE_DEVICE void overlapped(int stages_done, int slabs, Accumulator& acc) const {
    using namespace cute;
    typename C::Mma mma;
    Tensor tCrX = tokens();
    Tensor tCrW =
        make_tensor<int8_t>(make_layout(make_shape(Shape<_4, _2, _2>{}, _1{}, _2{}, _2{})));
    Cursor<C> at(stages_done, k_group);
    const int first = at.slab;
    for (; at.slab < slabs; at.advance()) {
      Barrier::wait(&shared.full[at.slot()], at.phase());
      CUTE_UNROLL
      for (int block = 0; block < C::kStageBlocks; ++block) {
        Tensor tCrW_block = tCrW(_, _, _, block % 2);
        uint32_t weights[8];
        dequantize<C>(shared.weights[at.slot()][panel] + block * LiquidQuant::kBlockBytes, thread,
                      weights);
        auto registers = recast<uint32_t>(tCrW_block);
        CUTE_UNROLL
        for (int r = 0; r < 8; ++r)
          registers(r % 4, 0, r / 4) = weights[r];
        warpgroup_fence_operand(tCrW_block);
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        gemm(mma, tCrW_block(_, _, 0), tCrX(_, _, 2 * block, at.slot()), acc);
        gemm(mma, tCrW_block(_, _, 1), tCrX(_, _, 2 * block + 1, at.slot()), acc);
        warpgroup_commit_batch();
        warpgroup_wait<1>();
        if (block == 0)
          warp_arrive(&shared.empty[at.slot_before()], at.slab != first);
      }
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    warp_arrive(&shared.empty[at.slot_before()], slabs > first);
  }

  // ExCP: multiplies what a dequantizer has put into shared memory.
  template <class Accumulator>
  CUTE_DEVICE void from_shared(int stages_done, int slabs, Accumulator& acc) const {
    using namespace cute;
    typename C::Mma mma;
    Tensor tCrX = tokens();
    Tensor sW = make_tensor(make_smem_ptr(shared.decoded[worker]), typename C::DecodedLayout{});
    auto thread_mma = mma.get_thread_slice(thread);
    Tensor tCrW = thread_mma.make_fragment_A(thread_mma.partition_A(sW));  // (MMA, 1, step, buffer)
    Cursor<C> at(stages_done, k_group);
    const int first = at.slab;
    for (; at.slab < slabs; at.advance()) {
      Barrier::wait(&shared.full[at.slot()], at.phase());
      Barrier::wait(&shared.ready[worker][at.buffer()], at.buffer_phase());
      warpgroup_fence_operand(acc);
      warpgroup_arrive();
      CUTE_UNROLL
      for (int step = 0; step < kSteps; ++step)
        gemm(mma, tCrW(_, _, step, at.buffer()), tCrX(_, _, step, at.slot()), acc);
      warpgroup_commit_batch();
      warpgroup_wait<1>();
      warp_arrive(&shared.empty[at.slot_before()], at.slab != first);
      warp_arrive(&shared.taken[worker][at.buffer() ^ 1], at.slab != first);
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    warp_arrive(&shared.empty[at.slot_before()], slabs > first);
    warp_arrive(&shared.taken[worker][at.buffer() ^ 1], slabs > first);
  }
};

}  // namespace ablation
