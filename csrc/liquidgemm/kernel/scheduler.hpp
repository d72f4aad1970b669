// Which output tile a CTA computes, or which part of one along K, in which order.
//
// Static and persistent. A worker is a CTA or a cluster. There are two kinds of clusters:
//
//   split_k   their CTAs share every tile along K (tiles for few tokens)
//   pairs     two CTAs compute neighbouring tiles along N and share the loads of their tokens. What
//             is left for the last round, if it is so little that half of the GPU would be idle, is
//             shared along K: one tile per pair
//
// Tiles of a band of kBandTiles m-tiles are walked with m fastest, so that concurrent CTAs share
// weight panels, and the tokens of a band stay in L2 while n advances.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/kernel/params.hpp"

namespace liquidgemm {

// A tile, or a part of it along K.
struct WorkItem {
  int m_tile, n_tile;
  int begin, end;   // in pipeline stages along K
  int stages_done;  // by this CTA before this item: its position in the ring
  bool split;       // whether a pair shares it along K
};

template <class Tile>
class Scheduler {
 public:
  CUTE_DEVICE explicit Scheduler(KernelParams const& params) : params_(params) {}

  CUTE_DEVICE bool valid() const {
    if (is_split())
      return item_ == params_.whole_rounds && worker() < params_.split_tiles;
    return unit() < params_.m_tiles * params_.n_tiles;
  }
  CUTE_DEVICE void advance() { ++item_; }
  // Whether this CTA has no item after this one.
  CUTE_DEVICE bool is_last() const {
    Scheduler next = *this;
    next.advance();
    return !next.valid();
  }
  // Items that this CTA has finished: the one counter that a role carries from item to item.
  CUTE_DEVICE int item() const { return item_; }

  CUTE_DEVICE WorkItem work() const {
    const int stages = (params_.k_blocks + Tile::kStageBlocks - 1) / Tile::kStageBlocks;
    WorkItem work;
    if (is_split()) {
      locate(work, params_.whole_rounds * workers() + worker() / 2, worker() % 2);
      share(work, stages, 1);
      work.stages_done = item_ * stages;
      work.split = true;
    } else {
      locate(work, unit(), rank());
      share(work, stages, Tile::kPairs ? 0 : params_.log2_split);
      work.stages_done = item_ * (work.end - work.begin);
      work.split = false;
    }
    return work;
  }

  CUTE_DEVICE static int rank() { return cute::block_rank_in_cluster(); }

 private:
  // Without clusters, a cluster is a CTA.
  CUTE_DEVICE static int worker() { return cute::cluster_id_in_grid().x; }
  CUTE_DEVICE static int workers() { return cute::cluster_grid_dims().x; }

  CUTE_DEVICE int unit() const { return worker() + item_ * workers(); }  // a tile, or a pair
  CUTE_DEVICE bool is_split() const {
    return Tile::kPairs && params_.pairs && item_ >= params_.whole_rounds;
  }

  CUTE_DEVICE void locate(WorkItem& work, int unit, int side) const {
    int m_tile = 0, n_tile = unit;
    if (params_.m_tiles > 1) {
      int band, in_band;
      params_.band_units(band, in_band, unit);
      const bool whole = (band + 1) * kBandTiles <= params_.m_tiles;
      (whole ? params_.band_height : params_.last_band_height)(n_tile, m_tile, in_band);
      m_tile += band * kBandTiles;
    }
    work.m_tile = m_tile;
    work.n_tile = Tile::kPairs && params_.pairs ? 2 * n_tile + side : n_tile;
  }

  // This CTA's part of an even split of K over the cluster; it may be empty.
  CUTE_DEVICE static void share(WorkItem& work, int stages, int log2_split) {
    const int part = rank() & ((1 << log2_split) - 1);
    work.begin = stages * part >> log2_split;
    work.end = stages * (part + 1) >> log2_split;
  }

  KernelParams const& params_;
  int item_ = 0;
};

}  // namespace liquidgemm
