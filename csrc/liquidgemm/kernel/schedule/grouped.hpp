// The work of a grouped GEMM: rows of x sorted by expert, each expert with a weight of its own. How
// many rows an expert has is known to the device alone.
//
// The tiles of an expert are those of a dense GEMM of its rows; the experts' tiles follow each
// other. Worker i (a CTA or a cluster) takes tiles i, i + workers, ... . One warp of every CTA
// resolves their places, well ahead of the roles, which read them from a ring of entries in shared
// memory:
//
//   role              threads               waits for         arrives at (counts: protocol.hpp)
//   ----------------  --------------------  ----------------  ---------------------------------
//   resolver          a warp, last group    taken[entry]      resolved[entry]
//   all other roles   as in kernel.hpp      resolved[entry]   taken[entry]
//
// Each lane of the resolver knows how many m tiles a run of experts has; a tile is found among the
// lanes, then among the experts of that lane. The last entry says that there is no tile: it may be
// the first one.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/fast_math.h>

#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/protocol.hpp"
#include "liquidgemm/kernel/schedule/dense.hpp"
#include "liquidgemm/kernel/schedule/work_item.hpp"
#include "liquidgemm/kernel/storage.hpp"
#include "liquidgemm/kernel/store/gated.hpp"

namespace liquidgemm {

template <class Tile>
class GroupedScheduler;

// A resolved tile, behind SharedStorage.
struct ScheduleEntry {
  int first_token, tokens;
  int n_tile;
  int expert;  // negative: no tile, and none after it
};

struct GroupedSchedule {
  // A loader is never ahead of the consumers by more items than the ring has stages.
  static constexpr int kEntries = 16;

  alignas(16) ScheduleEntry entries[kEntries];
  uint64_t resolved[kEntries];
  uint64_t taken[kEntries];
};

struct GroupedWork {
  template <class Tile>
  using Scheduler = GroupedScheduler<Tile>;
  template <class Tile>
  using Epilogue = GatedEpilogue<Tile>;
  static constexpr int kScheduleBytes = sizeof(GroupedSchedule);

  int32_t const* offsets;  // [experts + 1]
  int experts, experts_per_lane;
  cutlass::FastDivmod n_tiles;     // of an m tile
  cutlass::FastDivmod band_tiles;  // kBandTiles m tiles
  int tile_tokens;                 // height of m tiles but the last of an expert
  ClusterParams cluster;           // no pairs
  bool weights_are_read_once;      // mostly
  // Whether the offsets can be read before the previous kernel has finished: it started only after
  // what wrote them was complete.
  bool offsets_are_visible;
  bool gated;  // whether an activation ends the product
  GatedActivation gate;

  CUTE_DEVICE bool reads_weights_once() const { return weights_are_read_once; }
};

using GroupedParams = KernelParams<GroupedWork>;

template <class Tile>
class GroupedScheduler {
  using Barrier = cutlass::arch::ClusterBarrier;
  static constexpr int kEntries = GroupedSchedule::kEntries;
  static_assert(!Tile::kQuantizes, "both loaders walk the items");
  static_assert(Tile::kStagesAhead == 0, "a CTA may have no tile, and so nothing to hold");

 public:
  CUTE_DEVICE GroupedScheduler(Sizes const& sizes, GroupedWork const& params)
      : sizes_(sizes), params_(params) {}

  // By one thread, which makes the barriers visible.
  CUTE_DEVICE static void init() {
    for (int i = 0; i < kEntries; ++i) {
      Barrier::init(&shared().resolved[i], Arrivals<Tile>::kResolved);
      Barrier::init(&shared().taken[i], Arrivals<Tile>::kTaken);
    }
  }

  // What ends the product.
  CUTE_DEVICE bool gated() const { return params_.gated; }
  CUTE_DEVICE GatedActivation gate() const { return params_.gate; }

  CUTE_DEVICE bool valid() const { return is_tile(item_); }
  CUTE_DEVICE bool is_last() const { return !is_tile(item_ + 1); }
  CUTE_DEVICE int item() const { return item_; }
  CUTE_DEVICE void advance() {
    const bool consumes = threadIdx.x < Tile::kConsumerThreads;
    if (consumes)
      __syncwarp();
    arrive_if(!consumes || threadIdx.x % 32 < kReleasesPerWarp, &shared().taken[item_ % kEntries]);
    ++item_;
  }

  CUTE_DEVICE WorkItem work() const {
    const int stages = (sizes_.k_blocks + Tile::kStageBlocks - 1) / Tile::kStageBlocks;
    const int log2_split = Tile::kPairs ? 0 : params_.cluster.log2_split;
    const int part = cta_rank() & ((1 << log2_split) - 1);
    WorkItem work{};
    work.begin = stages * part >> log2_split;
    work.end = stages * (part + 1) >> log2_split;
    work.stages_done = item_ * (work.end - work.begin);
    return work;
  }

  CUTE_DEVICE Place place(WorkItem const&) const {
    const ScheduleEntry entry = shared().entries[item_ % kEntries];
    Place place;
    place.first_token = entry.first_token;
    place.tokens = entry.tokens;
    place.first_panel = entry.n_tile * Tile::kPanels;
    place.panels = min(Tile::kPanels, sizes_.panels - place.first_panel);
    place.packed_panel = entry.expert * sizes_.panels + place.first_panel;
    place.scale_offset = entry.expert * sizes_.n;
    return place;
  }

  // By one warp.
  CUTE_DEVICE static void resolve(Sizes const& sizes, GroupedWork const& params) {
    if (!params.offsets_are_visible)
      wait_on_dependent_grids();
    const int lane = threadIdx.x % 32;
    const int run = params.experts_per_lane;
    int tiles = 0;  // m tiles of this lane's experts
#pragma unroll 4
    for (int i = 0; i < run; ++i)
      tiles += Rows(sizes, params, lane * run + i).tiles(params);
    const int end = inclusive_sum(tiles);
    int item = 0;
    for (int tile = cute::cluster_id_in_grid().x;; tile += cute::cluster_grid_dims().x, ++item) {
      const int m_tile = params.n_tiles.div(tile);  // of all experts
      const uint32_t found = __ballot_sync(kAllLanes, end > m_tile);
      if (found == 0)
        break;
      const int owner = __ffs(found) - 1;
      const int before = __shfl_sync(kAllLanes, end - tiles, owner);
      const Rows rows(sizes, params, lane < run ? owner * run + lane : params.experts);
      const int tiles_of_expert = rows.tiles(params);
      const int expert_end = before + inclusive_sum(tiles_of_expert);
      if (lane == __ffs(__ballot_sync(kAllLanes, expert_end > m_tile)) - 1) {
        const int first = expert_end - tiles_of_expert;
        publish(item, entry(params, rows, tile - first * params.n_tiles.divisor, tiles_of_expert,
                            owner * run + lane));
      }
    }
    if (lane == 0)
      publish(item, {.first_token = 0, .tokens = 0, .n_tile = 0, .expert = -1});
  }

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;

  // An expert's. Whatever the offsets hold, they are rows of x.
  struct Rows {
    int begin = 0, end = 0;

    CUTE_DEVICE Rows(Sizes const& sizes, GroupedWork const& params, int expert) {
      if (expert < params.experts) {
        // Not from L1: it may hold what was there before the offsets were written.
        begin = min(max(__ldcg(&params.offsets[expert]), 0), sizes.m);
        end = min(max(__ldcg(&params.offsets[expert + 1]), begin), sizes.m);
      }
    }
    CUTE_DEVICE int tiles(GroupedWork const& params) const {
      return (end - begin + params.tile_tokens - 1) / params.tile_tokens;
    }
  };

  // The tile of this number among an expert's.
  CUTE_DEVICE static ScheduleEntry entry(
      GroupedWork const& params, Rows const& rows, int tile, int m_tiles, int expert) {
    int band, in_band;
    params.band_tiles(band, in_band, tile);
    const int first_of_band = band * kBandTiles;
    const int height = min(kBandTiles, m_tiles - first_of_band);
    const int n_tile = in_band / height;
    const int m_tile = first_of_band + in_band - n_tile * height;
    const int first = rows.begin + m_tile * params.tile_tokens;
    return {.first_token = first,
            .tokens = min(params.tile_tokens, rows.end - first),
            .n_tile = n_tile,
            .expert = expert};
  }

  CUTE_DEVICE static void publish(int item, ScheduleEntry const& entry) {
    const int slot = item % kEntries;
    Barrier::wait(&shared().taken[slot], item / kEntries % 2 ^ 1);
    shared().entries[slot] = entry;
    Barrier::arrive(&shared().resolved[slot]);
  }

  CUTE_DEVICE static int inclusive_sum(int value) {
    CUTE_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, value, distance);
      value += threadIdx.x % 32 >= distance ? other : 0;
    }
    return value;
  }

  CUTE_DEVICE static bool is_tile(int item) {
    Barrier::wait(&shared().resolved[item % kEntries], item / kEntries % 2);
    return shared().entries[item % kEntries].expert >= 0;
  }

  CUTE_DEVICE static GroupedSchedule& shared() {
    extern __shared__ uint8_t shared_bytes[];
    return *reinterpret_cast<GroupedSchedule*>(shared_bytes + sizeof(SharedStorage<Tile>));
  }

  Sizes const& sizes_;
  GroupedWork const& params_;
  int item_ = 0;
};

}  // namespace liquidgemm
