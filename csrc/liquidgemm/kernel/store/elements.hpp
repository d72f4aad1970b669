// Results of any type and alignment, element by element: through shared memory, since registers
// cannot be indexed at run time and unrolled the code would be long.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "liquidgemm/kernel/reduce/cluster.hpp"
#include "liquidgemm/kernel/store/output_tile.hpp"

namespace liquidgemm {

// Two tokens of a channel, two of the channel eight further on.
template <class T, class Tile>
CUTE_DEVICE void store_elements(OutputTile<Tile> const& out,
                                int octet,
                                cute::array<T, 4> const& elements) {
  const int token = out.token_of(octet);
  const int channels = out.sizes.n - out.first_channel - out.first_row();
  T* const y = static_cast<T*>(out.params.y) + (out.first_token + token) * out.params.y_stride +
               out.first_channel + out.first_row();
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (out.stores(token + i % 2) && i / 2 * 8 < channels)
      y[i % 2 * out.params.y_stride + i / 2 * 8] = elements[i];
  }
}

template <class Tile>
CUTE_DEVICE void store_octet(OutputTile<Tile> const& out, int octet, int4 const& sum) {
  if (out.params.y_type == Element::kInt32)
    return store_elements<int32_t>(out, octet, {sum.x, sum.y, sum.z, sum.w});
  const auto channels = out.channel_values();
  const float2 token_scale = out.token_scales(octet);
  const float y[4] = {scaled(sum.x, token_scale.x, channels.scale[0], channels.bias[0]),
                      scaled(sum.y, token_scale.y, channels.scale[0], channels.bias[0]),
                      scaled(sum.z, token_scale.x, channels.scale[1], channels.bias[1]),
                      scaled(sum.w, token_scale.y, channels.scale[1], channels.bias[1])};
  if (out.params.y_type == Element::kBFloat16) {
    store_elements<__nv_bfloat16>(out, octet,
                                  {__float2bfloat16_rn(y[0]), __float2bfloat16_rn(y[1]),
                                   __float2bfloat16_rn(y[2]), __float2bfloat16_rn(y[3])});
  } else if (out.params.y_type == Element::kFloat16) {
    store_elements<__half>(out, octet,
                           {__float2half_rn(y[0]), __float2half_rn(y[1]), __float2half_rn(y[2]),
                            __float2half_rn(y[3])});
  } else {
    store_elements<float>(out, octet, {y[0], y[1], y[2], y[3]});
  }
}

// Sums of k groups that take turns.
template <class Tile>
CUTE_DEVICE void store_turns(OutputTile<Tile> const& out,
                             ClusterSums<Tile> const& sums,
                             typename ClusterSums<Tile>::Octets const& sums_of_group,
                             int k_group) {
  using Sums = ClusterSums<Tile>;
  CUTE_UNROLL
  for (int turn = 0; turn < Sums::kTurns; ++turn) {
    if (sums.owns(turn, k_group))
      *sums.group_part(Sums::octet_of_turn(turn, k_group), 0) = sums_of_group[turn];
  }
  CUTE_NO_UNROLL
  for (int turn = 0; turn < Sums::kTurns; ++turn) {
    const int octet = Sums::octet_of_turn(turn, k_group);
    if (sums.owns(turn, k_group))
      store_octet(out, octet, *sums.group_part(octet, 0));
  }
}

// Those of a panel's only group, a chunk at a time.
template <class Tile, class Accumulator>
CUTE_DEVICE void store_octets(OutputTile<Tile> const& out,
                              ClusterSums<Tile> const& sums,
                              Accumulator const& acc) {
  constexpr int kOctets = Tile::kChunkTokens / 8;
  CUTE_NO_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    CUTE_UNROLL
    for (int c = 0; c < Tile::kChunks; ++c) {
      if (c == chunk) {
        CUTE_UNROLL
        for (int i = 0; i < kOctets; ++i)
          *sums.staged(i) = octet_of(acc, c * kOctets + i);
      }
    }
    if (owns(out.ownership, chunk)) {
      CUTE_NO_UNROLL
      for (int i = 0; i < kOctets; ++i)
        store_octet(out, chunk * kOctets + i, *sums.staged(i));
    }
  }
}

}  // namespace liquidgemm
