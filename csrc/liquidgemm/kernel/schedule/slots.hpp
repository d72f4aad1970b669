// The work of a product of few tokens by the experts of their slots: slot s has one row of y, which
// is a row of x times the weight of expert ids[s]. Nothing is sorted, and x is quantized by the
// CTA: all of its rows are operand B of every tile, and one row of the tile is stored.
//
//   slots_per_row = top_k   rows of x are tokens, as in the first product of a layer of experts
//   slots_per_row = 1       rows of x are slots, as in the second
//
// Worker i (a CTA or a cluster) takes tiles i, i + workers, ... . Those of one panel by all slots
// are neighbours: slots of the same expert then share its weights in the L2 cache. A slot whose id
// is none of an expert has tiles, too, which load and store nothing.
//
// Every role reads the id of a tile by itself. The weight loader may do that before the previous
// kernel has finished: see `ids_are_visible`.
#pragma once

#include <cutlass/fast_math.h>

#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/common/expert.hpp"
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/schedule/work_item.hpp"
#include "liquidgemm/kernel/store/gated.hpp"

namespace liquidgemm {

template <class Tile>
class SlotScheduler;

struct SlotWork {
  template <class Tile>
  using Scheduler = SlotScheduler<Tile>;
  template <class Tile>
  using Epilogue = GatedEpilogue<Tile>;
  static constexpr int kScheduleBytes = 0;

  ExpertIds ids;
  cutlass::FastDivmod slots, slots_per_row;
  ClusterParams cluster;  // no pairs
  // Whether the ids can be read before the previous kernel has finished: it started only after what
  // wrote them was complete.
  bool ids_are_visible;
  bool gated;  // whether an activation ends the product
  GatedActivation gate;

  CUTE_DEVICE bool reads_weights_once() const { return true; }
};

using SlotParams = KernelParams<SlotWork>;

template <class Tile>
class SlotScheduler {
  static_assert(Tile::kQuantizes && Tile::kOctets == 1, "all rows of x are in every tile");
  static_assert(Tile::kPanels == 1);

 public:
  CUTE_DEVICE SlotScheduler(Sizes const& sizes, SlotWork const& params)
      : sizes_(sizes), params_(params) {
    if (!params.ids_are_visible)
      wait_on_dependent_grids();
  }

  // What ends the product.
  CUTE_DEVICE bool gated() const { return params_.gated; }
  CUTE_DEVICE GatedActivation gate() const { return params_.gate; }

  CUTE_DEVICE bool valid() const { return tile(item_) < tiles(); }
  CUTE_DEVICE bool is_last() const { return tile(item_ + 1) >= tiles(); }
  CUTE_DEVICE int item() const { return item_; }
  CUTE_DEVICE void advance() {
    ++item_;
    expert_ = kUnread;
  }

  CUTE_DEVICE WorkItem work() const {
    const int stages = (sizes_.k_blocks + Tile::kStageBlocks - 1) / Tile::kStageBlocks;
    const int part = cta_rank() & ((1 << params_.cluster.log2_split) - 1);
    WorkItem work{};
    work.begin = stages * part >> params_.cluster.log2_split;
    work.end = stages * (part + 1) >> params_.cluster.log2_split;
    work.stages_done = item_ * (work.end - work.begin);
    return work;
  }

  CUTE_DEVICE Place place(WorkItem const&) const {
    int slot, n_tile;
    params_.slots(n_tile, slot, tile(item_));
    if (expert_ == kUnread)
      expert_ = expert_of(params_.ids, slot);
    const int row = params_.slots_per_row.div(slot);
    const bool exists = expert_ >= 0;
    Place place;
    place.first_token = slot - row;
    place.skipped = row;
    place.tokens = exists ? row + 1 : 0;
    place.first_panel = n_tile;
    place.panels = exists;
    place.packed_panel = max(expert_, 0) * sizes_.panels + n_tile;
    place.scale_offset = max(expert_, 0) * sizes_.n;
    return place;
  }

 private:
  static constexpr int kUnread = -2;

  CUTE_DEVICE static int tile(int item) {
    return cute::cluster_id_in_grid().x + item * cute::cluster_grid_dims().x;
  }
  CUTE_DEVICE int tiles() const { return params_.slots.divisor * sizes_.panels; }

  Sizes const& sizes_;
  SlotWork const& params_;
  int item_ = 0;
  // Read when a tile is placed for the first time, so that it occupies no register while tokens are
  // quantized, which takes all of them.
  mutable int expert_ = kUnread;
};

}  // namespace liquidgemm
