// The work of a dense GEMM: which output tile a CTA computes, or which part of one along K, in
// which order.
//
// Static and persistent. A worker is a CTA or a cluster. There are two kinds of clusters:
//
//   split K   the CTAs share every tile along K (tiles for few tokens)
//   pairs     two CTAs compute neighbouring tiles along N and share the loads of their tokens. If
//             the tiles of the last round would leave half of the GPU idle, pairs share them along
//             K, one tile per pair
//
//   pairs, 5 workers, 13 pairs of tiles:      rounds of whole tiles    split tiles
//     pair 0   CTA 0 | CTA 1                   0 | 0'    5 | 5'         10  : K 0..1/2 | K 1/2..1
//     pair 1   CTA 0 | CTA 1                   1 | 1'    6 | 6'         10' : K 0..1/2 | K 1/2..1
//     ...
//
// Tiles of a band of kBandTiles m tiles are walked with m fastest, so that concurrent CTAs share
// weight panels, and the tokens of a band stay in L2 while n advances.
#pragma once

#include <cutlass/fast_math.h>

#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/kernel/epilogue.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/schedule/work_item.hpp"

namespace liquidgemm {

inline constexpr int kBandTiles = 8;

template <class Tile>
class DenseScheduler;

struct DenseWork {
  template <class Tile>
  using Scheduler = DenseScheduler<Tile>;
  template <class Tile>
  using Epilogue = liquidgemm::Epilogue<Tile>;
  static constexpr int kScheduleBytes = 0;

  int m_tiles, n_tiles;  // in pairs, n_tiles counts pairs of tiles
  // Bands of m tiles: tiles of a band, its height, the height of the last band.
  cutlass::FastDivmod band_tiles, band_height, last_band_height;
  int tile_tokens;  // m tiles are of equal height, at most Tile::kTokens: no box lies half outside
                    // of x
  ClusterParams cluster;
  int whole_rounds;  // of a tile, or a pair of them, per worker
  int split_tiles;   // after those, each by the two CTAs of a pair

  CUTE_DEVICE bool reads_weights_once() const { return m_tiles == 1; }
};

using DenseParams = KernelParams<DenseWork>;

template <class Tile>
class DenseScheduler {
 public:
  CUTE_DEVICE DenseScheduler(Sizes const& sizes, DenseWork const& params)
      : sizes_(sizes), params_(params) {}

  CUTE_DEVICE bool valid() const {
    if (is_split())
      return item_ == params_.whole_rounds && worker() < params_.split_tiles;
    return tile() < params_.m_tiles * params_.n_tiles;
  }
  CUTE_DEVICE void advance() { ++item_; }
  CUTE_DEVICE bool is_last() const {
    DenseScheduler next = *this;
    next.advance();
    return !next.valid();
  }
  CUTE_DEVICE int item() const { return item_; }

  CUTE_DEVICE WorkItem work() const {
    const int stages = (sizes_.k_blocks + Tile::kStageBlocks - 1) / Tile::kStageBlocks;
    WorkItem work;
    if (is_split()) {
      locate(work, params_.whole_rounds * workers() + worker() / 2, worker() % 2);
      divide_k(work, stages, 1);
      work.stages_done = item_ * stages;
      work.split = true;
    } else {
      locate(work, tile(), cta_rank());
      divide_k(work, stages, Tile::kPairs ? 0 : params_.cluster.log2_split);
      work.stages_done = item_ * (work.end - work.begin);
      work.split = false;
    }
    return work;
  }

  CUTE_DEVICE Place place(WorkItem const& work) const {
    Place place;
    place.first_token = work.m_tile * params_.tile_tokens;
    place.tokens = min(params_.tile_tokens, sizes_.m - place.first_token);
    place.first_panel = work.n_tile * Tile::kPanels;
    place.panels = max(0, min(Tile::kPanels, sizes_.panels - place.first_panel));
    place.packed_panel = place.first_panel;
    place.scale_offset = 0;
    return place;
  }

 private:
  // Without clusters, a cluster is a CTA.
  CUTE_DEVICE static int worker() { return cute::cluster_id_in_grid().x; }
  CUTE_DEVICE static int workers() { return cute::cluster_grid_dims().x; }

  CUTE_DEVICE int tile() const { return worker() + item_ * workers(); }  // or pair of tiles
  CUTE_DEVICE bool is_split() const {
    return Tile::kPairs && params_.cluster.pairs && item_ >= params_.whole_rounds;
  }

  CUTE_DEVICE void locate(WorkItem& work, int tile, int side) const {
    int m_tile = 0, n_tile = tile;
    if (params_.m_tiles > 1) {
      int band, in_band;
      params_.band_tiles(band, in_band, tile);
      const bool whole = (band + 1) * kBandTiles <= params_.m_tiles;
      (whole ? params_.band_height : params_.last_band_height)(n_tile, m_tile, in_band);
      m_tile += band * kBandTiles;
    }
    work.m_tile = m_tile;
    work.n_tile = Tile::kPairs && params_.cluster.pairs ? 2 * n_tile + side : n_tile;
  }

  // This CTA's part of an even division of K by the CTAs of the cluster; it may be empty.
  CUTE_DEVICE static void divide_k(WorkItem& work, int stages, int log2_split) {
    const int part = cta_rank() & ((1 << log2_split) - 1);
    work.begin = stages * part >> log2_split;
    work.end = stages * (part + 1) >> log2_split;
  }

  Sizes const& sizes_;
  DenseWork const& params_;
  int item_ = 0;
};

}  // namespace liquidgemm
