// A consumer warp-group's main loop: LDS -> dequantize in registers -> wgmma.
//
// The A registers are double-buffered, and the loop waits for the multiplication before the last
// one only: block i + 1 is dequantized while the tensor cores multiply block i. Consumers
// synchronize with the producer alone, never with one another.
//
// Where k groups take turns, a group has time between its stages: it waits for its multiplications
// and gives the stage back at once, since at few tokens all depends on how much is on the way. A
// group that takes every stage gives it back after the first multiplication of the next one.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/quantized_tokens.hpp"
#include "liquidgemm/kernel/ring.hpp"
#include "liquidgemm/kernel/scheduler.hpp"

namespace liquidgemm {

template <class Tile>
struct Consumer {
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::rs_op_selector<
          int8_t,
          int8_t,
          int32_t,
          cute::Shape<cute::_64, cute::Int<Tile::kTokens>, cute::Int<kMmaK>>>()));
  // (token, k, slot): 128-byte rows, one TMA box of 128 k after the other.
  using TokenLayout = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<int8_t>{},
      cute::make_shape(
          cute::Int<Tile::kTokens>{}, cute::Int<Tile::kStageK>{}, cute::Int<Tile::kStages>{})));
  static_assert(Tile::kQuantizes ||
                cute::cosize_v<TokenLayout> == Tile::kStages * Tile::kStageTokenBytes);

  CUTE_DEVICE static auto make_accumulator() {
    return cute::partition_fragment_C(Mma{}, cute::Shape<cute::_64, cute::Int<Tile::kTokens>>{});
  }

  // Adds this group's share of stages `begin` to `slabs` of a tile to acc: those whose number,
  // counted from the first tile on, is k_group modulo kKGroups. The tile begins at number
  // `stages_done`. `pair_rank` is the CTA whose ring its warps release, too, or negative.
  template <class Accumulator>
  CUTE_DEVICE static void multiply(KernelParams const& params,
                                   SharedStorage<Tile>& shared,
                                   int stages_done,
                                   int begin,
                                   int slabs,
                                   int panel,
                                   int k_group,
                                   int pair_rank,
                                   Accumulator& acc) {
    using namespace cute;
    const int thread = threadIdx.x % kWarpGroupThreads;
    Mma mma;
    Tensor tCrX = token_operands(shared);
    // Operand B of a k step: in the ring, or where it counts from this CTA's first.
    auto const tokens = [&](int step, int slot, int slab) {
      if constexpr (Tile::kQuantizes) {
        return QuantizedTokens<Tile>::operand(params, shared,
                                              slab * (Tile::kStageK / kMmaK) + step);
      } else {
        return tCrX(_, _, step, slot);
      }
    };
    auto tCrW = weight_operands<2>();  // double-buffered

    constexpr int kGroups = Tile::kKGroups;
    const int first = begin + (k_group + kGroups - stages_done % kGroups) % kGroups;
    RingState<Tile> ring(stages_done + first);
    const WeightReader reader(&shared.weights[0][panel][0], thread);
    // A group that takes every stage waits for the next one before its last multiplications of this
    // one: the ring is ahead of it, and the next weights are at hand in time.
    constexpr bool kTakesTurns = kGroups > 1;
    Weights next{};
    if (!kTakesTurns && first < slabs)
      next = wait_and_load(shared, reader, ring);
    for (int slab = first; slab < slabs; slab += kGroups) {
      const int slot = ring.slot;
      CUTE_UNROLL
      for (int block = 0; block < Tile::kStageBlocks; ++block) {
        if (kTakesTurns && block == 0)
          next = wait_and_load(shared, reader, ring);
        const Weights weights = next;
        // On its way from shared memory while this block is dequantized.
        if (block + 1 < Tile::kStageBlocks) {
          next = reader.load(slot, block + 1);
        } else {
          ring.advance(kGroups);
          if (!kTakesTurns && slab + kGroups < slabs)
            next = wait_and_load(shared, reader, ring);
        }
        Tensor tCrW_block = tCrW(_, _, _, block % 2);
        dequantize(weights, tCrW_block);
        // Pins the registers here: arithmetic moved behind the arrive would make ptxas serialize
        // the wgmmas.
        warpgroup_fence_operand(tCrW_block);
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        gemm(mma, tCrW_block(_, _, 0), tokens(2 * block, slot, slab), acc);
        gemm(mma, tCrW_block(_, _, 1), tokens(2 * block + 1, slot, slab), acc);
        warpgroup_commit_batch();
        if (kTakesTurns && block + 1 == Tile::kStageBlocks) {
          warpgroup_wait<0>();
          release(shared, slot, true, pair_rank);
        } else {
          // The block before this one is done: its registers are free, and with the first block of
          // a stage the stage before.
          warpgroup_wait<1>();
          if (!kTakesTurns && block == 0)
            release(shared, ring.behind(kGroups), slab != first, pair_rank);
        }
      }
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    if (!kTakesTurns)
      release(shared, ring.behind(kGroups), slabs > first, pair_rank);
  }

  // With programmatic dependent launch a CTA may have weights long before the kernel before this
  // one has finished the activations. The first stages of its first tile are dequantized meanwhile,
  // by `dequantize_ahead`; `multiply_ahead` does the rest when there are tokens. Both are unrolled,
  // since registers cannot be indexed.
  CUTE_DEVICE static auto make_operands_ahead() {
    constexpr int kBlocks = Tile::kStagesAhead * Tile::kStageBlocks;
    return weight_operands<kBlocks ? kBlocks : 1>();
  }

  template <class Operands>
  CUTE_DEVICE static void dequantize_ahead(KernelParams const& params,
                                           SharedStorage<Tile>& shared,
                                           int k_group,
                                           Operands& operands) {
    using namespace cute;
    const WeightReader reader(&shared.weights[0][0][0], threadIdx.x % kWarpGroupThreads);
    CUTE_UNROLL
    for (int i = 0; i < Tile::kStagesAhead; ++i) {
      if (i == params.stages_ahead)
        break;
      const int stage = i * Tile::kKGroups + k_group;
      cutlass::arch::ClusterBarrier::wait(&shared.ahead[stage], 0);
      CUTE_UNROLL
      for (int block = 0; block < Tile::kStageBlocks; ++block) {
        Tensor to = operands(_, _, _, i * Tile::kStageBlocks + block);
        dequantize(reader.load(stage, block), to);
      }
    }
  }

  template <class Operands, class Accumulator>
  CUTE_DEVICE static void multiply_ahead(KernelParams const& params,
                                         SharedStorage<Tile>& shared,
                                         int k_group,
                                         Operands& operands,
                                         Accumulator& acc) {
    using namespace cute;
    Mma mma;
    Tensor tCrX = token_operands(shared);
    warpgroup_fence_operand(operands);
    CUTE_UNROLL
    for (int i = 0; i < Tile::kStagesAhead; ++i) {
      if (i == params.stages_ahead)
        break;
      const int slot = i * Tile::kKGroups + k_group;
      cutlass::arch::ClusterBarrier::wait(&shared.full[slot], 0);
      warpgroup_fence_operand(acc);
      warpgroup_arrive();
      CUTE_UNROLL
      for (int step = 0; step < 2 * Tile::kStageBlocks; ++step) {
        gemm(mma, operands(_, _, step % 2, i * Tile::kStageBlocks + step / 2),
             tCrX(_, _, step, slot), acc);
      }
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc);
      release(shared, slot, true, -1);
    }
  }

 private:
  // Blocks of weights as A operands: (MMA, 1, k step of the block, block).
  template <int kBlocks>
  CUTE_DEVICE static auto weight_operands() {
    using namespace cute;
    return make_tensor<int8_t>(
        make_layout(make_shape(Shape<_4, _2, _2>{}, _1{}, _2{}, Int<kBlocks>{})));
  }

  CUTE_DEVICE static auto token_operands(SharedStorage<Tile>& shared) {  // (MMA, 1, k step, slot)
    using namespace cute;
    auto thread_mma = Mma{}.get_thread_slice(threadIdx.x % kWarpGroupThreads);
    Tensor sX = make_tensor(make_smem_ptr(shared.tokens), TokenLayout{});
    return thread_mma.make_fragment_B(thread_mma.partition_B(sX));
  }

  // One block of this thread's weights: 32 codes, and the (s, a) pairs of its two channels.
  struct Weights {
    uint4 codes;
    uint32_t params;
  };

  class WeightReader {
   public:
    CUTE_DEVICE WeightReader(uint8_t const* first_block, int thread)
        : codes_(cute::cast_smem_ptr_to_uint(first_block) + 16 * thread),
          params_(cute::cast_smem_ptr_to_uint(first_block) + kBlockCodeBytes +
                  4 * param_word(thread)) {
      // Hides where they come from: ptxas would compute both anew for every block.
      asm volatile("" : "+r"(codes_), "+r"(params_));
    }

    CUTE_DEVICE Weights load(int slot, int block) const {
      Weights w;
      const uint32_t offset = slot * Tile::kStageWeightBytes + block * kBlockBytes;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w.codes.x), "=r"(w.codes.y), "=r"(w.codes.z), "=r"(w.codes.w)
                   : "r"(codes_ + offset));
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w.params) : "r"(params_ + offset));
      return w;
    }

   private:
    uint32_t codes_, params_;
  };

  CUTE_DEVICE static Weights wait_and_load(SharedStorage<Tile>& shared,
                                           WeightReader const& reader,
                                           RingState<Tile> const& ring) {
    cutlass::arch::ClusterBarrier::wait(&shared.full[ring.slot], ring.phase);
    return reader.load(ring.slot, 0);
  }

  // Into 8 A registers.
  template <class Registers>
  CUTE_DEVICE static void dequantize(Weights const& weights, Registers&& out) {
    const uint32_t params = weights.params;
    const uint4 codes = weights.codes;
    // (s, a) of channel g in the low half, of g + 8 in the high half: zero-extend s, replicate a.
    const uint32_t step[2] = {__byte_perm(params, 0, 0x4440), __byte_perm(params, 0, 0x4442)};
    const uint32_t offsets[2] = {__byte_perm(params, 0, 0x1111), __byte_perm(params, 0, 0x3333)};
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    auto registers = cute::recast<uint32_t>(out);  // (4 registers, 1, k step)
    CUTE_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row_half = r % 2;
      registers(r, 0, 0) = decode4(words[r] & 0x0f0f0f0fu, step[row_half], offsets[row_half]);
      registers(r, 0, 1) =
          decode4((words[r] >> 4) & 0x0f0f0f0fu, step[row_half], offsets[row_half]);
    }
  }

  // Without a branch: ptxas serializes wgmmas whose pipeline crosses a divergent one.
  CUTE_DEVICE static void release(SharedStorage<Tile>& shared,
                                  int slot,
                                  bool condition,
                                  int pair_rank) {
    __syncwarp();
    const bool arrives = condition && threadIdx.x % 32 < kReleasesPerWarp;
    arrive_if(arrives, &shared.empty[slot]);
    if constexpr (Tile::kPairs)
      arrive_at_peer_if(arrives && pair_rank >= 0, &shared.empty[slot], pair_rank);
  }
};

}  // namespace liquidgemm
