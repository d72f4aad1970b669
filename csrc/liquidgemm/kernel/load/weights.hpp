// The weight loader: one thread. It is not the token loader's, because only the tokens depend on
// the previous kernel: with programmatic dependent launch it requests the weights of the first
// stages while that kernel still runs.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/util.hpp>

#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/ring.hpp"
#include "liquidgemm/kernel/schedule/work_item.hpp"
#include "liquidgemm/kernel/storage.hpp"

namespace liquidgemm {

template <class Tile>
class WeightLoader {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  static constexpr int kBlockBytes = Tile::Format::kBlockBytes;

 public:
  CUTE_DEVICE WeightLoader(Sizes const& sizes,
                           WeightParams const& params,
                           PrefetchParams const& prefetch,
                           SharedStorage<Tile>& shared)
      : sizes_(sizes), params_(params), prefetch_(prefetch), shared_(shared) {}

  // Blocks past the end of K or N are not loaded. The slot then holds old data, which is multiplied
  // by activations of zero or contributes to output channels that are not stored.
  template <class Work>
  CUTE_DEVICE void load(Work const& work) const {
    // Weights that one tile alone needs would push activations out of the L2 cache.
    const auto hint =
        static_cast<uint64_t>(work.reads_weights_once() ? cute::TMA::CacheHintSm90::EVICT_FIRST
                                                        : cute::TMA::CacheHintSm90::EVICT_NORMAL);
    const int64_t panel_bytes = int64_t(sizes_.k_blocks) * kBlockBytes;
    const int before_tokens = Tile::kStages * prefetch_.eighths_ahead / 8;
    const int ahead = prefetch_.stages_ahead * Tile::kKGroups;
    auto& barriers = shared_.barriers;
    load_items<Tile>(sizes_, work,
                     [&](WorkItem const& item, Place const& place, RingState<Tile>& ring) {
                       int blocks_left = sizes_.k_blocks - item.begin * Tile::kStageBlocks;
                       uint8_t const* from = params_.packed + place.packed_panel * panel_bytes +
                                             int64_t(item.begin) * Tile::kStageBlocks * kBlockBytes;
                       CUTE_NO_UNROLL
                       for (int i = item.begin; i < item.end; ++i) {
                         const int bytes = min(Tile::kStageBlocks, blocks_left) * kBlockBytes;
                         Barrier::wait(&barriers.empty[ring.slot], ring.phase ^ 1);
                         const int stage = item.stages_done + i - item.begin;
                         if (stage == before_tokens)  // more weights would delay the first tokens
                           Barrier::wait(Tile::kQuantizes ? &barriers.read : &barriers.full[0], 0);
                         uint64_t* arrived = &barriers.full[ring.slot];
                         if (Tile::kStagesAhead > 0 && stage < ahead) {
                           Barrier::arrive(arrived);
                           arrived = &barriers.ahead[stage];
                         }
                         Barrier::arrive_and_expect_tx(arrived, place.panels * bytes);
                         CUTE_UNROLL
                         for (int panel = 0; panel < Tile::kPanels; ++panel) {
                           if (panel < place.panels) {
                             bulk_load(shared_.weights[ring.slot][panel],
                                       from + panel * panel_bytes, bytes, arrived, hint);
                           }
                         }
                         from += Tile::kStageBlocks * kBlockBytes;
                         blocks_left -= Tile::kStageBlocks;
                         ring.advance(1);
                       }
                     });
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

  Sizes const& sizes_;
  WeightParams const& params_;
  PrefetchParams const& prefetch_;
  SharedStorage<Tile>& shared_;
};

}  // namespace liquidgemm
