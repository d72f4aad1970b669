// A position in the ring of pipeline stages. Both sides walk the same sequence of stages; a
// consumer may step over stages of other k groups.
//
// A *stage* counts along K; it is loaded into a *slot* of the ring, stage modulo kStages.
#pragma once

#include <cstdint>

#include <cute/config.hpp>

#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/schedule/work_item.hpp"

namespace liquidgemm {

template <class Tile>
struct RingState {
  int slot;
  uint32_t phase;

  CUTE_DEVICE explicit RingState(int stages_done)
      : slot(stages_done % Tile::kStages), phase(stages_done / Tile::kStages % 2) {}

  CUTE_DEVICE void advance(int stages) {  // stages <= Tile::kStages
    slot += stages;
    if (slot >= Tile::kStages) {
      slot -= Tile::kStages;
      phase ^= 1;
    }
  }

  CUTE_DEVICE int behind(int stages) const {  // the slot that many stages ago
    return slot >= stages ? slot - stages : slot - stages + Tile::kStages;
  }
};

// A loader's walk: load(item, place, ring) for every work item, where ring is at the item's first
// stage and load advances it. Returns the position after the last item.
template <class Tile, class Work, class Load>
CUTE_DEVICE RingState<Tile> load_items(Sizes const& sizes, Work const& work, Load const& load) {
  RingState<Tile> ring(0);
  using Scheduler = typename Work::template Scheduler<Tile>;
  for (Scheduler scheduler(sizes, work); scheduler.valid(); scheduler.advance()) {
    const WorkItem item = scheduler.work();
    load(item, scheduler.place(item), ring);
  }
  return ring;
}

}  // namespace liquidgemm
