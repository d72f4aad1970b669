// The producer: one thread that keeps the ring full.
#pragma once

#include <cutlass/arch/grid_dependency_control.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/ring.hpp"
#include "liquidgemm/kernel/scheduler.hpp"

namespace liquidgemm {

template <class Tile>
class Producer {
 public:
  CUTE_DEVICE Producer(KernelParams const& params, SharedStorage<Tile>& shared)
      : params_(params), shared_(shared) {}

  // Weights never depend on the kernel before this one, tokens do. So a first lap of the ring is
  // filled with weights while that kernel may still be running; run() adds the tokens.
  CUTE_DEVICE void request_first_weights() const {
    StageCursor cursor(params_);
    CUTE_NO_UNROLL
    for (int slot = 0; slot < Tile::kStages && cursor.valid(); ++slot, cursor.next()) {
      request_weights(cursor, slot);
    }
  }

  CUTE_DEVICE void run() const {
    cutlass::arch::wait_on_dependent_grids();
    // Only now may the next kernel start: what ran before this kernel is complete and visible then.
    cutlass::arch::launch_dependent_grids();

    StageCursor cursor(params_);
    int slots = 0;
    CUTE_NO_UNROLL
    for (; slots < Tile::kStages && cursor.valid(); ++slots, cursor.next()) {
      request_tokens(cursor, slots);
    }
    RingState<Tile> ring(0);  // counts from the second lap; a short first lap leaves nothing to do
    CUTE_NO_UNROLL
    for (; cursor.valid(); cursor.next(), ring.advance(1)) {
      cutlass::arch::ClusterBarrier::wait(&shared_.empty[ring.slot], ring.phase);
      request_weights(cursor, ring.slot);
      request_tokens(cursor, ring.slot);
    }
    if (params_.multicast > 1) {
      // Peers arrive at this CTA's barriers: it may exit once all of them are done with all slots.
      for (; slots > 0; --slots, ring.advance(1)) {
        cutlass::arch::ClusterBarrier::wait(&shared_.empty[ring.slot], ring.phase);
      }
    }
  }

 private:
  // Walks all stages of all tiles of this CTA.
  class StageCursor {
   public:
    CUTE_DEVICE explicit StageCursor(KernelParams const& params) : scheduler_(params) {
      range_ = slab_range<Tile>(params);
      slab_ = range_.begin;
      if (scheduler_.valid())
        coord_ = scheduler_.coord();
    }
    // An empty range never yields a stage.
    CUTE_DEVICE bool valid() const { return scheduler_.valid() && range_.begin < range_.end; }
    CUTE_DEVICE void next() {
      if (++slab_ < range_.end)
        return;
      slab_ = range_.begin;
      scheduler_.advance();
      if (scheduler_.valid())
        coord_ = scheduler_.coord();
    }
    CUTE_DEVICE TileCoord coord() const { return coord_; }
    CUTE_DEVICE int k_block() const { return slab_ * Tile::kStageBlocks; }

   private:
    TileScheduler scheduler_;
    SlabRange range_;
    TileCoord coord_{0, 0};
    int slab_;
  };

  // Bytes past the end of K or N are not loaded: what the slot holds there meets activations that
  // TMA filled with zeros, or output channels that are not stored.
  CUTE_DEVICE void request_weights(StageCursor const& cursor, int slot) const {
    const int blocks = min(Tile::kStageBlocks, params_.k_blocks - cursor.k_block());
    const int first_panel = cursor.coord().n_tile * Tile::kPanels;
    const int panels = max(0, min(Tile::kPanels, params_.panels - first_panel));
    const int bytes = blocks * kBlockBytes;
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(
        &shared_.full[slot], panels * bytes + Tile::kStageTokenBytes);
    for (int panel = 0; panel < panels; ++panel) {
      const int64_t block = int64_t(first_panel + panel) * params_.k_blocks + cursor.k_block();
      cute::SM90_BULK_COPY_G2S::copy(params_.weight + block * kBlockBytes, &shared_.full[slot],
                                     shared_.weights[slot][panel], bytes);
    }
  }

  CUTE_DEVICE void request_tokens(StageCursor const& cursor, int slot) const {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
    const int token = cursor.coord().m_tile * Tile::kTokens;
    CUTE_UNROLL
    for (int box = 0; box < Tile::kStageBlocks / 2; ++box) {
      const int k = (cursor.k_block() + 2 * box) * kBlockK;
      int8_t* const to = shared_.tokens[slot] + box * Tile::kTokens * 128;
      if (params_.multicast == 1) {
        cute::SM90_TMA_LOAD_2D::copy(&params_.x_map, &shared_.full[slot], kHint, to, k, token);
      } else {  // this CTA's part, to the same place in every CTA of the cluster
        const int part = Tile::kTokens / params_.multicast * cute::block_rank_in_cluster();
        const uint16_t all = (1 << params_.multicast) - 1;
        cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&params_.x_map, &shared_.full[slot], all, kHint,
                                               to + part * 128, k, token + part);
      }
    }
  }

  KernelParams const& params_;
  SharedStorage<Tile>& shared_;
};

}  // namespace liquidgemm
