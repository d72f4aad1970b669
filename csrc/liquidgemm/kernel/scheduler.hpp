// Which output tiles a CTA (or a split-K cluster of CTAs) computes, in which order, and which part
// of K is its own.
#pragma once

#include <cute/config.hpp>

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

  CUTE_DEVICE TileScheduler(KernelParams const& params, int cluster_id, int num_clusters)
      : m_tiles_(params.m_tiles),
        n_tiles_(params.n_tiles),
        tile_(cluster_id),
        stride_(num_clusters) {}

  CUTE_DEVICE bool valid() const { return tile_ < m_tiles_ * n_tiles_; }
  CUTE_DEVICE void advance() { tile_ += stride_; }

  CUTE_DEVICE TileCoord coord() const {
    const int band = tile_ / (kBandTiles * n_tiles_);
    const int in_band = tile_ - band * kBandTiles * n_tiles_;
    const int height = min(kBandTiles, m_tiles_ - band * kBandTiles);
    return {band * kBandTiles + in_band % height, in_band / height};
  }

 private:
  int m_tiles_, n_tiles_, tile_, stride_;
};

// This CTA's part of an even split of K's stages over the cluster; it may be empty.
template <class Tile>
CUTE_DEVICE SlabRange slab_range(KernelParams const& params, int cta_rank) {
  const int64_t slabs = (params.k_blocks + Tile::kStageBlocks - 1) / Tile::kStageBlocks;
  return {static_cast<int>(slabs * cta_rank / params.split_k),
          static_cast<int>(slabs * (cta_rank + 1) / params.split_k)};
}

}  // namespace liquidgemm
