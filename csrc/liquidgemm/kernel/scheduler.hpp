// Which output tiles a CTA (or a split-K cluster of CTAs) computes, in which order, and which part
// of K is its own.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/kernel/params.hpp"

namespace liquidgemm {

struct TileCoord {
  int m_tile, n_tile;
};

struct SlabRange {
  int begin, end;  // in pipeline stages along K
};

// Static and persistent: cluster i takes tiles i, i + clusters, ... Tiles of a band of kBandTiles
// m-tiles are walked with m fastest, so that concurrent CTAs share weight panels, and the tokens of
// a band stay in L2 while n advances.
class TileScheduler {
 public:
  static constexpr int kBandTiles = 8;

  CUTE_DEVICE explicit TileScheduler(KernelParams const& params) : params_(params) {}

  CUTE_DEVICE bool valid() const { return tile() < params_.m_tiles * params_.n_tiles; }
  CUTE_DEVICE void advance() { ++iteration_; }
  // Tiles this CTA has finished. The one counter that a role carries from tile to tile: positions
  // in the ring and barrier phases follow from it.
  CUTE_DEVICE int iteration() const { return iteration_; }

  CUTE_DEVICE TileCoord coord() const {
    if (params_.m_tiles == 1)  // few tokens: spares them the divisions
      return {0, tile()};
    const int band = tile() / (kBandTiles * params_.n_tiles);
    const int in_band = tile() - band * kBandTiles * params_.n_tiles;
    const int height = min(kBandTiles, params_.m_tiles - band * kBandTiles);
    return {band * kBandTiles + in_band % height, in_band / height};
  }

 private:
  CUTE_DEVICE int tile() const {  // without clusters, a cluster is a CTA
    return cute::cluster_id_in_grid().x + iteration_ * cute::cluster_grid_dims().x;
  }

  KernelParams const& params_;
  int iteration_ = 0;
};

// This CTA's part of an even split of K's stages over the cluster; it may be empty.
template <class Tile>
CUTE_DEVICE SlabRange slab_range(KernelParams const& params) {
  const int rank = cute::block_rank_in_cluster();
  const int slabs = (params.k_blocks + Tile::kStageBlocks - 1) / Tile::kStageBlocks;
  const int log2_split = __ffs(params.split_k) - 1;
  return {slabs * rank >> log2_split, slabs * (rank + 1) >> log2_split};
}

}  // namespace liquidgemm
