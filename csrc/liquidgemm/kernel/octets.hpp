// Where a consumer thread's accumulators lie. They hold Y transposed, 64 channels x kTokens, and
// are handled in octets of tokens: four values per thread, 16 bytes. Lane l of warp w of a group
// has the channels g = 16 w + l / 4 and g + 8 of the panel, and of an octet the tokens t = 2 (l %
// 4) and t + 1:
//
//                  token t   t + 1
//   channel g            x   y
//   channel g + 8        z   w        the int4 of a thread
#pragma once

#include <cute/config.hpp>

namespace liquidgemm {

// A thread's sums of eight tokens: two tokens of two channels.
template <class Accumulator>
CUTE_DEVICE int4 octet_of(Accumulator const& acc, int octet) {
  return {acc(4 * octet), acc(4 * octet + 1), acc(4 * octet + 2), acc(4 * octet + 3)};
}

template <class Tile>
CUTE_DEVICE int panel_thread() {  // among the consumers of a panel
  return threadIdx.x % Tile::kPanelThreads;
}

}  // namespace liquidgemm
