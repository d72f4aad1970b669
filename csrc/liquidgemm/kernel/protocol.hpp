// All barriers: what a phase of each means, who arrives, and how often.
//
// clang-format off
//   barrier          a phase means                            arrivals per phase             and bytes
//   ---------------  ---------------------------------------  -----------------------------  ------------
//   full[slot]       a stage has been loaded                  1 per loader of the stage      of the stage
//   empty[slot]      a stage has been read                    1 per warp that reads it; in
//                                                             pairs also the peer's
//   ahead[stage]     the weights of one of the first stages   1: the weight loader           of those
//                    have arrived; full then counts tokens
//   read             the consumers have read x to quantize    1: thread 0
//                    it; weights no longer delay it
//   received[panel]  the cluster's partial sums have arrived  1: the panel's thread 0        of the sums
//   drained[panel]   every CTA has read what it received      1 per warp of the panel, from
//                                                             every CTA
//   multiplied       the peer no longer needs its ring        1 per consumer warp of the peer
//
//   if a warp resolves tiles (schedule/grouped.hpp, where they are initialized):
//   resolved[entry]  the place of a tile is known             1: a lane of the resolver
//   taken[entry]     every role is done with the place        1 per loader and per consumer warp
//
//   named barriers: one per panel, for its consumer threads
// clang-format on
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

#include <cute/config.hpp>

#include "liquidgemm/kernel/params.hpp"

namespace liquidgemm {

inline constexpr int kWarpsPerGroup = 4;

// Arrivals at `empty` per warp. One lane arrives for its warp, after a __syncwarp that orders the
// other lanes' reads before. racecheck cannot see that (the __syncwarp leaves no instruction), so
// the build that it examines lets every lane arrive: see `make sanitize`.
#ifdef LIQUIDGEMM_EVERY_LANE_ARRIVES
inline constexpr int kReleasesPerWarp = 32;
#else
inline constexpr int kReleasesPerWarp = 1;
#endif

template <class Tile>
struct Arrivals {
  // The weight loader, and a loader of tokens unless the consumers quantize them.
  static constexpr int kFull = 1 + (Tile::kQuantizes ? 0 : 1);
  static constexpr int kAhead = 1;
  static constexpr int kRead = 1;
  static constexpr int kReceived = 1;
  static constexpr int kMultiplied = Tile::kConsumerGroups * kWarpsPerGroup;
  static constexpr int kResolved = 1;
  // The loaders of a stage, and every consumer warp, read each entry.
  static constexpr int kTaken = kFull + Tile::kConsumerGroups * kWarpsPerGroup * kReleasesPerWarp;
  static constexpr int empty(bool pairs) {
    return kWarpsOfStage * kReleasesPerWarp * (pairs ? 2 : 1);
  }
  static constexpr int drained(int split_k) { return Tile::kKGroups * kWarpsPerGroup * split_k; }

 private:
  // One k group of every panel reads a stage.
  static constexpr int kWarpsOfStage = Tile::kPanels * kWarpsPerGroup;

  // The same, counted: group panel * kKGroups + k reads the stages that are k modulo kKGroups.
  static constexpr int warps_that_read(int stage) {
    int warps = 0;
    for (int group = 0; group < Tile::kConsumerGroups; ++group)
      warps += group % Tile::kKGroups == stage % Tile::kKGroups ? kWarpsPerGroup : 0;
    return warps;
  }
  static constexpr bool stages_have_equal_readers() {
    for (int stage = 0; stage < 2 * Tile::kStages; ++stage) {
      const bool same_group = stage % Tile::kKGroups == stage % Tile::kStages % Tile::kKGroups;
      if (warps_that_read(stage) != kWarpsOfStage || !same_group)
        return false;
    }
    return true;
  }
  static_assert(stages_have_equal_readers(),
                "`empty` has one count for every slot, and a slot always belongs to one k group");
  static_assert(!Tile::kPairs || Tile::kKGroups == 1,
                "in a pair both CTAs' warps read a slot, so that `empty` counts twice as many");
  static_assert(Tile::kStagesAhead * Tile::kKGroups <= Tile::kStages,
                "ahead[stage] is awaited in phase 0 alone: its slot is loaded once before");
  static_assert(!Tile::kQuantizes || (Tile::kStagesAhead == 0 && Tile::kPanels == 1),
                "full[slot] is without tokens, and one panel's barrier meets all consumers");
  static constexpr int kMostArrivals = (1 << 20) - 1;  // of an mbarrier
  static_assert(empty(true) <= kMostArrivals && drained(8) <= kMostArrivals);
};

// Kept in this order: wgmma's operands and TMA's targets lie before it, with wider alignments.
template <class Tile>
struct Barriers {
  alignas(8) uint64_t full[Tile::kStages];
  uint64_t empty[Tile::kStages];
  uint64_t ahead[Tile::kStagesAhead ? Tile::kStagesAhead * Tile::kKGroups : 1];
  uint64_t received[Tile::kPanels];
  uint64_t drained[Tile::kPanels];
  uint64_t multiplied;
  uint64_t read;

  // By one thread.
  CUTE_DEVICE void init(ClusterParams const& cluster, bool pairs) {
    using cutlass::arch::ClusterBarrier;
    using Arrivals = liquidgemm::Arrivals<Tile>;
    for (int slot = 0; slot < Tile::kStages; ++slot) {
      ClusterBarrier::init(&full[slot], Arrivals::kFull);
      ClusterBarrier::init(&empty[slot], Arrivals::empty(pairs));
    }
    for (int stage = 0; stage < Tile::kStagesAhead * Tile::kKGroups; ++stage)
      ClusterBarrier::init(&ahead[stage], Arrivals::kAhead);
    const int split_k = cluster.split_k();
    if (Tile::kQuantizes)
      ClusterBarrier::init(&read, Arrivals::kRead);
    ClusterBarrier::init(&multiplied, Arrivals::kMultiplied);
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      ClusterBarrier::init(&received[panel], Arrivals::kReceived);
      ClusterBarrier::init(&drained[panel], Arrivals::drained(split_k));
    }
    cutlass::arch::fence_barrier_init();
    cutlass::arch::fence_view_async_shared();
  }
};

// Named barriers, counted from those that CUTLASS reserves.
enum NamedBarriers : uint32_t { kPanelBarrier = 0 };  // and on: one per panel

// Synchronizes the consumer threads of a panel.
template <class Tile>
CUTE_DEVICE void panel_barrier(int panel) {
  static_assert(cutlass::arch::NamedBarrier::ReservedNamedBarrierCount + kPanelBarrier +
                    Tile::kPanels <=
                cutlass::arch::NamedBarrier::HardwareMaxNumNamedBarriers);
  cutlass::arch::NamedBarrier::arrive_and_wait(Tile::kPanelThreads, kPanelBarrier + panel);
}

}  // namespace liquidgemm
