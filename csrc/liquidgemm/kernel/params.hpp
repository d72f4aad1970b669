// What the host hands to the kernel.
#pragma once

#include <cuda.h>

#include <cstdint>

#include <cutlass/fast_math.h>

#include <cute/config.hpp>

#include "liquidgemm/common/element.hpp"

namespace liquidgemm {

inline constexpr int kBandTiles = 8;

struct KernelParams {
  CUtensorMap x_map;  // where it does not: int8 [m, k], box [tile_tokens, 128], with pairs half as
                      // many tokens; 128-byte swizzle, zero fill past the edges
  CUtensorMap y_map;  // y of 16 bits, if rows_are_vectors and the tile stores by TMA:
                      // box [store_tokens, 64], 128-byte swizzle
  uint8_t const* weight;      // packed [panels, k_blocks, kBlockBytes]
  float const* x_scale;       // [m]
  float const* weight_scale;  // [n]
  void const* bias;           // [n] or null
  void* y;                    // [m, n], row stride y_stride elements
  int64_t y_stride;
  Element bias_type;
  Element y_type;  // kInt32: the raw sums, scales and bias ignored
  int m, n;
  int panels, k_blocks;
  int m_tiles, n_tiles;
  // Bands of kBandTiles m tiles, see scheduler.hpp: tiles of a band, its height, that of the last.
  cutlass::FastDivmod band_units, band_height, last_band_height;
  int tile_tokens;  // m tiles are of equal height, at most Tile::kTokens: no box lies half outside
                    // x
  int log2_split;   // of the CTAs of a cluster that share every output tile along K
  // Clusters of two that compute two neighbouring tiles along N for so many rounds, n_tiles
  // counting such pairs, and then share single tiles along K, so many in all.
  bool pairs;
  int whole_rounds, split_tiles;
  int eighths_ahead;  // of the ring, requested before the first tokens are here: plan/rules.hpp
  int stages_ahead;   // of each k group, dequantized before there are tokens; at most
                      // Tile::kStagesAhead, and no more than every CTA's first tile has
  // Where the kernel quantizes, instead of x_map and x_scale: dense [m, k], elements of 16 bits.
  void const* x;
  int k;

  CUTE_HOST_DEVICE int split_k() const { return 1 << log2_split; }
  CUTE_HOST_DEVICE int cluster() const { return pairs ? 2 : split_k(); }

  // Whether every row of y is a whole number of aligned 16-byte vectors, for elements of 2 bytes.
  CUTE_HOST_DEVICE bool rows_are_vectors() const {
    return (reinterpret_cast<uintptr_t>(y) | (y_stride * 2) | (n * 2)) % 16 == 0;
  }
};

}  // namespace liquidgemm
