// Where a consumer thread's results lie in y, and what its sums are multiplied by. octets.hpp says
// which sums a thread has.
#pragma once

#include <cute/config.hpp>
#include <cute/container/array.hpp>

#include "liquidgemm/common/formula.hpp"
#include "liquidgemm/kernel/octets.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/protocol.hpp"
#include "liquidgemm/kernel/reduce/pair.hpp"
#include "liquidgemm/kernel/storage.hpp"

namespace liquidgemm {

template <class Tile>
struct OutputTile {
  Sizes const& sizes;
  OutputParams const& params;
  SharedStorage<Tile>& shared;
  int panel;  // of the tile
  int first_token, tokens, skipped, first_channel;
  Ownership ownership;

  struct ChannelValues {
    float scale[2], bias[2];
  };

  // Recomputed rather than held in registers during the main loop.
  CUTE_DEVICE static int thread() { return panel_thread<Tile>(); }
  CUTE_DEVICE static int first_row() {  // of two, eight apart
    return threadIdx.x % kWarpGroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
  }
  CUTE_DEVICE static int token_of(int octet) {  // the first of two neighbours
    return 8 * octet + threadIdx.x % 4 * 2;
  }

  CUTE_DEVICE bool stores(int token) const {
    return token < tokens && (!Tile::kSkipsRows || token >= skipped);
  }

  // Of a tile that a pair shares along K each CTA stores every other chunk.
  CUTE_DEVICE bool split() const { return ownership != Ownership::kAllChunks; }

  CUTE_DEVICE ChannelValues channel_values() const {
    auto const& values = shared.channel_values[panel];
    const int row = first_row();
    return {{values[0][row], values[0][row + 8]}, {values[1][row], values[1][row + 8]}};
  }
  CUTE_DEVICE float2 token_scales(int octet) const {
    return *reinterpret_cast<float2 const*>(&shared.token_scale[panel][token_of(octet)]);
  }

  // A thread's results of an octet, two tokens to a word: one word for each of its channels.
  template <class Pair>
  CUTE_DEVICE cute::array<uint32_t, 2> round_octet(int octet,
                                                   int4 const& sum,
                                                   ChannelValues const& channels) const {
    const float2 token_scale = token_scales(octet);
    return {round_pair(scaled(sum.x, token_scale.x, channels.scale[0], channels.bias[0]),
                       scaled(sum.y, token_scale.y, channels.scale[0], channels.bias[0]), Pair{}),
            round_pair(scaled(sum.z, token_scale.x, channels.scale[1], channels.bias[1]),
                       scaled(sum.w, token_scale.y, channels.scale[1], channels.bias[1]), Pair{})};
  }
};

}  // namespace liquidgemm
