// Tokens that a loader thread fetches into the ring by TMA, and their layout there as operand B.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/ring.hpp"
#include "liquidgemm/kernel/schedule/work_item.hpp"
#include "liquidgemm/kernel/storage.hpp"

namespace liquidgemm {

template <class Tile>
class TmaTokens {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  // (token, k, slot): 128-byte rows, one TMA box of 128 k after the other.
  using Layout = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<int8_t>{},
      cute::make_shape(
          cute::Int<Tile::kTokens>{}, cute::Int<Tile::kStageK>{}, cute::Int<Tile::kStages>{})));
  static_assert(cute::cosize_v<Layout> == Tile::kStages * Tile::kStageTokenBytes);

 public:
  CUTE_DEVICE static void prefetch_descriptor(CUtensorMap const& map) {
    cute::prefetch_tma_descriptor(&map);
  }

  // One thread calls it. In a pair each CTA loads half of the tokens for both CTAs, unless they
  // share the tile along K.
  template <class Work>
  CUTE_DEVICE static void load(CUtensorMap const& map,
                               Sizes const& sizes,
                               Work const& work,
                               SharedStorage<Tile>& shared) {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
    const int bytes = work.tile_tokens * Tile::kStageK;
    const bool pairs = Tile::kPairs && work.cluster.pairs;
    const int half = work.tile_tokens / 2;  // in pairs, the rows of a box
    auto& barriers = shared.barriers;
    RingState<Tile> ring = load_items<Tile>(
        sizes, work, [&](WorkItem const& item, Place const& place, RingState<Tile>& ring) {
          // Waits for the previous kernel; from the second item on it returns at once. The next
          // kernel may start only after that, since it must see what ran before this kernel.
          wait_on_dependent_grids();
          launch_dependent_grids();
          CUTE_NO_UNROLL
          for (int stage = item.begin; stage < item.end; ++stage) {
            Barrier::wait(&barriers.empty[ring.slot], ring.phase ^ 1);
            Barrier::arrive_and_expect_tx(&barriers.full[ring.slot], bytes);
            CUTE_UNROLL
            for (int box = 0; box < Tile::kStageBlocks / 2; ++box) {
              int8_t* const to =
                  shared.tokens + ring.slot * Tile::kStageTokenBytes + box * Tile::kTokens * 128;
              const int k = stage * Tile::kStageK + box * 128;
              if (pairs && !item.split) {
                const int row = half * cta_rank();
                cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, &barriers.full[ring.slot], 0b11, kHint,
                                                       to + row * 128, k, place.first_token + row);
              } else {
                cute::SM90_TMA_LOAD_2D::copy(&map, &barriers.full[ring.slot], kHint, to, k,
                                             place.first_token);
                if (pairs) {
                  cute::SM90_TMA_LOAD_2D::copy(&map, &barriers.full[ring.slot], kHint,
                                               to + half * 128, k, place.first_token + half);
                }
              }
            }
            ring.advance(1);
          }
        });
    // The peer arrives at this CTA's barriers, which must outlive its arrivals.
    for (int slot = 0; pairs && slot < Tile::kStages; ++slot) {
      Barrier::wait(&barriers.empty[ring.slot], ring.phase ^ 1);
      ring.advance(1);
    }
  }

  // Operand B of a k step of a slot. Other sources of tokens need `stage` instead, counted from
  // this CTA's first.
  template <class Mma>
  class Operands {
   public:
    CUTE_DEVICE Operands(Sizes const&, SharedStorage<Tile>& shared)
        : tCrX_(partition<Mma>(shared)) {}

    CUTE_DEVICE auto operator()(int step, int slot, int /*stage*/) const {
      return tCrX_(cute::_, cute::_, step, slot);
    }

   private:
    decltype(partition<Mma>(std::declval<SharedStorage<Tile>&>())) tCrX_;
  };

 private:
  template <class Mma>
  CUTE_DEVICE static auto partition(SharedStorage<Tile>& shared) {  // (MMA, 1, k step, slot)
    using namespace cute;
    auto thread_mma = Mma{}.get_thread_slice(threadIdx.x % kWarpGroupThreads);
    Tensor sX = make_tensor(make_smem_ptr(shared.tokens), Layout{});
    return thread_mma.make_fragment_B(thread_mma.partition_B(sX));
  }
};

}  // namespace liquidgemm
