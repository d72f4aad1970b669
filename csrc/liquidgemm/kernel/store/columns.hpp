// Results of 16 bits of k groups that take turns: the 8 x 8 matrices of an octet are transposed in
// registers, from a thread's channel to a thread's token, and four threads write eight channels of
// it.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "liquidgemm/kernel/reduce/cluster.hpp"
#include "liquidgemm/kernel/store/output_tile.hpp"

namespace liquidgemm {

template <class Pair, bool kSkips, class Tile>
CUTE_DEVICE void store_columns(OutputTile<Tile> const& out,
                               ClusterSums<Tile> const& sums,
                               typename ClusterSums<Tile>::Octets const& sums_of_group,
                               int k_group) {
  using Sums = ClusterSums<Tile>;
  const auto channels = out.channel_values();
  const int lane = threadIdx.x % 32;
  const int channel = out.first_channel + threadIdx.x % kWarpGroupThreads / 32 * 16;
  const int64_t turn_stride = 8 * Tile::kKGroups * out.params.y_stride;
  const int first = 8 * k_group + lane / 4;
  uint16_t* const y = static_cast<uint16_t*>(out.params.y) +
                      (out.first_token + first) * out.params.y_stride + channel + lane % 4 * 2;
  CUTE_UNROLL
  for (int turn = 0; turn < Sums::kTurns; ++turn) {
    if (kSkips && !sums.owns(turn, k_group))
      continue;
    const int octet = min(Sums::octet_of_turn(turn, k_group), Tile::kOctets - 1);
    const auto words = out.template round_octet<Pair>(octet, sums_of_group[turn], channels);
    uint16_t* const row = y + turn * turn_stride;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t transposed;
      cute::SM75_U32x1_MOVM_T::copy(words[i], transposed);
      // Rows are whole vectors of eight channels.
      if (out.stores(first + turn * 8 * Tile::kKGroups) && channel + 8 * i < out.sizes.n)
        *reinterpret_cast<uint32_t*>(row + 8 * i) = transposed;
    }
  }
}

template <class Pair, class Tile>
CUTE_DEVICE void store_columns(OutputTile<Tile> const& out,
                               ClusterSums<Tile> const& sums,
                               typename ClusterSums<Tile>::Octets const& sums_of_group,
                               int k_group) {
  if (ClusterSums<Tile>::kOverlaps && sums.is_whole()) {
    store_columns<Pair, false>(out, sums, sums_of_group, k_group);
  } else {
    store_columns<Pair, true>(out, sums, sums_of_group, k_group);
  }
}

}  // namespace liquidgemm
