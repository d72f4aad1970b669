// The compiled kernels. To add a tile, add its row here and a file to csrc/instantiations; the
// choice of plans takes it once its costs are measured.
#pragma once

#include <span>
#include <type_traits>

#include "liquidgemm/common/element.hpp"
#include "liquidgemm/formats/formats.hpp"
#include "liquidgemm/kernel/tile_shape.hpp"

namespace liquidgemm {

// Sorted by tokens; a comment says what a row and those below it are for.
inline constexpr TileShape kTileShapes[] = {
    {8, 1, 2, 4, 2, 1},   // decode: one panel per CTA spreads any N over the most SMs; a short K
    {8, 1, 4, 4, 1, 2},   // a longer one
    {16, 1, 2, 2, 2, 3},  //
    {16, 1, 4, 4, 1, 2},  //
    {32, 1, 2, 2, 2, 3},  //
    {32, 1, 3, 2},        //
    {32, 4, 1, 2},        // many panels share the tokens once their L2 traffic rivals the weights'
    {64, 1, 2, 2, 2},     // few panels, or a short K
    {64, 1, 3, 2},        // a longer one
    {64, 3, 1, 2},        // many panels again
    {64, 4, 1, 2},        //
    {96, 1, 3, 2},        // likewise
    {96, 2, 1, 2},        //
    {96, 3, 1, 2},        //
    {128, 1, 2, 2},       // few panels
    {128, 2, 1, 2},       // small prefill, or few tiles
    {128, 3, 1, 2},       //
    {128, 4, 1, 2},       //
    {192, 2, 1, 2},       // heights in between: little of the last m tile is wasted
    {192, 3, 1, 2},       //
    {224, 2, 1, 2},       //
    {256, 2, 1, 2},       // prefill: least dequantization per multiplication
};
inline constexpr int kNumTileShapes = sizeof(kTileShapes) / sizeof(kTileShapes[0]);

constexpr bool is_listed(TileShape const& tile, std::span<TileShape const> tiles) {
  for (TileShape const& listed : tiles) {
    if (listed == tile)
      return true;
  }
  return false;
}

// Of these, the ones that are compiled for INT8 weights: whatever it holds, a block takes 4096
// bytes of the ring, so that tiles of more panels, or of more tokens to a panel, have too few
// stages.
inline constexpr TileShape kInt8TileShapes[] = {
    {16, 1, 2, 2, 2, 3},  // decode, a short K
    {16, 1, 4, 4, 1, 2},  // a longer one
    {32, 1, 3, 2},        //
    {64, 3, 1, 2},        //
    {128, 2, 1, 2},       //
    {192, 2, 1, 2},       //
    {256, 2, 1, 2},       // prefill
};

// Of 6-bit codes: they are read more slowly than they are decoded, at any of these heights.
inline constexpr TileShape kLiquidQuant6TileShapes[] = {
    {16, 1, 4, 4, 1, 2},  // decode
    {32, 1, 3, 2},        //
    {64, 1, 3, 2},        // up to some hundred tokens
    {128, 2, 1, 2},       // small prefill
    {256, 2, 1, 2},       // prefill
};

// Of groups of 32: a twentieth more bytes than groups of 64, so that the same heights serve.
inline constexpr TileShape kLiquidQuantG32TileShapes[] = {
    {16, 1, 4, 4, 1, 2},  // decode
    {32, 1, 3, 2},        //
    {64, 1, 3, 2},        // up to some hundred tokens
    {128, 2, 1, 2},       // small prefill
    {256, 2, 1, 2},       // prefill
};

// Of a format: all, unless it has a list of its own.
template <class Format>
constexpr std::span<TileShape const> tiles_of() {
  if constexpr (std::is_same_v<Format, Int8>)
    return kInt8TileShapes;
  else if constexpr (std::is_same_v<Format, LiquidQuant6>)
    return kLiquidQuant6TileShapes;
  else if constexpr (std::is_same_v<Format, LiquidQuantG32>)
    return kLiquidQuantG32TileShapes;
  else
    return kTileShapes;
}

// Whether a kernel is compiled for this tile, weights of this format, and activations of x_type:
// int8, or 16 bits that the kernel quantizes.
template <class Format>
constexpr bool supports(TileShape const& tile, Element x_type) {
  const bool quantizes = x_type == Element::kBFloat16 || x_type == Element::kFloat16;
  return is_listed(tile, tiles_of<Format>()) &&
         (x_type == Element::kInt8 || (quantizes && tile.can_quantize()));
}
constexpr bool supports(FormatId format, TileShape const& tile, Element x_type) {
  return visit_format(format,
                      [&](auto of) { return supports<typename decltype(of)::type>(tile, x_type); });
}

// Of the tiles of a format, which are sorted by them.
constexpr int fewest_tokens(FormatId format) {
  return visit_format(
      format, [](auto of) { return tiles_of<typename decltype(of)::type>().front().tokens; });
}

}  // namespace liquidgemm
