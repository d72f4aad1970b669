// Where a tile's activations come from. The members of a source are load(), the work of its loader
// thread, and Operands, operand B for the consumers.
#pragma once

#include <type_traits>

#include "liquidgemm/kernel/load/tokens_quantized.hpp"
#include "liquidgemm/kernel/load/tokens_tma.hpp"

namespace liquidgemm {

template <class Tile, bool kQuantizes = Tile::kQuantizes>
struct TokenSource {
  using type = TmaTokens<Tile>;
};
template <class Tile>
struct TokenSource<Tile, true> {
  using type = QuantizedTokens<Tile>;
};
template <class Tile>
using Tokens = typename TokenSource<Tile>::type;

}  // namespace liquidgemm
