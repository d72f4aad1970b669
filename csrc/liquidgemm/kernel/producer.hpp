// The producers: one thread for the weights, one for the tokens, that keep the ring full.
//
// They are two because only the tokens depend on the kernel before this one: with programmatic
// dependent launch the weights of the first stages are on their way while that kernel still runs.
// Each counts its own bytes at a stage's `full` barrier; weights that are dequantized before there
// are tokens have one of their own.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/ring.hpp"
#include "liquidgemm/kernel/scheduler.hpp"

namespace liquidgemm {

template <class Tile>
class Producer {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;

 public:
  static constexpr int kThreads = Tile::kQuantizes ? 1 : 2;  // arrivals at `full`

  CUTE_DEVICE Producer(KernelParams const& params, SharedStorage<Tile>& shared)
      : params_(params), shared_(shared) {}

  // Blocks past the end of K or N are not loaded: what the slot holds there meets activations that
  // TMA filled with zeros, or output channels that are not stored.
  CUTE_DEVICE void load_weights() const {
    // Weights that only one row of tiles needs would push activations out of the L2 cache.
    const auto hint =
        static_cast<uint64_t>(params_.m_tiles == 1 ? cute::TMA::CacheHintSm90::EVICT_FIRST
                                                   : cute::TMA::CacheHintSm90::EVICT_NORMAL);
    const int64_t panel_bytes = int64_t(params_.k_blocks) * kBlockBytes;
    const int before_tokens = Tile::kStages * params_.eighths_ahead / 8;
    const int ahead = params_.stages_ahead * Tile::kKGroups;
    for_each_item([&](WorkItem const& work, RingState<Tile>& ring) {
      const int first_panel = work.n_tile * Tile::kPanels;
      const int panels = max(0, min(Tile::kPanels, params_.panels - first_panel));
      int blocks_left = params_.k_blocks - work.begin * Tile::kStageBlocks;
      uint8_t const* from = params_.weight + first_panel * panel_bytes +
                            int64_t(work.begin) * Tile::kStageBlocks * kBlockBytes;
      CUTE_NO_UNROLL
      for (int slab = work.begin; slab < work.end; ++slab) {
        const int bytes = min(Tile::kStageBlocks, blocks_left) * kBlockBytes;
        Barrier::wait(&shared_.empty[ring.slot], ring.phase ^ 1);
        const int stage = work.stages_done + slab - work.begin;
        if (stage == before_tokens)  // wait for the first of them
          Barrier::wait(Tile::kQuantizes ? &shared_.read : &shared_.full[0], 0);
        uint64_t* arrived = &shared_.full[ring.slot];
        if (Tile::kStagesAhead > 0 && stage < ahead) {
          Barrier::arrive(arrived);
          arrived = &shared_.ahead[stage];
        }
        Barrier::arrive_and_expect_tx(arrived, panels * bytes);
        CUTE_UNROLL
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
          if (panel < panels) {
            bulk_load(shared_.weights[ring.slot][panel], from + panel * panel_bytes, bytes, arrived,
                      hint);
          }
        }
        from += Tile::kStageBlocks * kBlockBytes;
        blocks_left -= Tile::kStageBlocks;
        ring.advance(1);
      }
    });
  }

  CUTE_DEVICE void load_tokens() const {
    if constexpr (Tile::kQuantizes) {  // the consumers do
      cutlass::arch::wait_on_dependent_grids();
      cutlass::arch::launch_dependent_grids();
      return;
    }
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
    const int bytes = params_.tile_tokens * Tile::kStageK;
    const bool pairs = Tile::kPairs && params_.pairs;
    const int half = params_.tile_tokens / 2;  // with pairs, the rows of a box
    RingState<Tile> ring = for_each_item([&](WorkItem const& work, RingState<Tile>& ring) {
      const int token = work.m_tile * params_.tile_tokens;
      // For the kernel before this one, when all else is ready; from the second item on it returns
      // at once. Only then may the next kernel start: what ran before this one is visible to it.
      cutlass::arch::wait_on_dependent_grids();
      cutlass::arch::launch_dependent_grids();
      CUTE_NO_UNROLL
      for (int slab = work.begin; slab < work.end; ++slab) {
        Barrier::wait(&shared_.empty[ring.slot], ring.phase ^ 1);
        Barrier::arrive_and_expect_tx(&shared_.full[ring.slot], bytes);
        CUTE_UNROLL
        for (int box = 0; box < Tile::kStageBlocks / 2; ++box) {
          int8_t* const to =
              shared_.tokens + ring.slot * Tile::kStageTokenBytes + box * Tile::kTokens * 128;
          const int k = slab * Tile::kStageK + box * 128;
          if (pairs && !work.split) {  // one half, for both
            const int row = half * Scheduler<Tile>::rank();
            cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&params_.x_map, &shared_.full[ring.slot], 0b11,
                                                   kHint, to + row * 128, k, token + row);
          } else {
            cute::SM90_TMA_LOAD_2D::copy(&params_.x_map, &shared_.full[ring.slot], kHint, to, k,
                                         token);
            if (pairs) {
              cute::SM90_TMA_LOAD_2D::copy(&params_.x_map, &shared_.full[ring.slot], kHint,
                                           to + half * 128, k, token + half);
            }
          }
        }
        ring.advance(1);
      }
    });
    // The other CTA arrives at this one's barriers, which must not be gone by then.
    for (int slot = 0; pairs && slot < Tile::kStages; ++slot) {
      Barrier::wait(&shared_.empty[ring.slot], ring.phase ^ 1);
      ring.advance(1);
    }
  }

 private:
  // One bulk copy, its bytes counted at `arrived`; CuTe's has no cache hint.
  CUTE_DEVICE static void bulk_load(
      void* to, void const* from, int bytes, uint64_t* arrived, uint64_t hint) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(cute::cast_smem_ptr_to_uint(to)),
        "l"(from), "r"(bytes), "r"(cute::cast_smem_ptr_to_uint(arrived)), "l"(hint)
        : "memory");
  }

  // Returns where in the ring the last item ended.
  template <class Body>
  CUTE_DEVICE RingState<Tile> for_each_item(Body const& body) const {
    RingState<Tile> ring(0);
    for (Scheduler<Tile> scheduler(params_); scheduler.valid(); scheduler.advance()) {
      body(scheduler.work(), ring);
    }
    return ring;
  }

  KernelParams const& params_;
  SharedStorage<Tile>& shared_;
};

}  // namespace liquidgemm
