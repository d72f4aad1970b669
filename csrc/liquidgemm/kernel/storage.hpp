// Shared memory as a whole.
#pragma once

#include <cstdint>

#include "liquidgemm/formats/block_layout.hpp"
#include "liquidgemm/kernel/protocol.hpp"

namespace liquidgemm {

template <class Tile>
struct alignas(1024) SharedStorage {
  // Tokens first: the 128-byte swizzle wants 1024-byte alignment.
  alignas(1024) int8_t tokens[Tile::kStages * Tile::kStageTokenBytes + Tile::kQuantizedBytes];
  alignas(1024) uint8_t staging[Tile::kPanels][Tile::kStagingBytes];  // swizzled, too
  alignas(16)
      uint8_t weights[Tile::kStages][Tile::kPanels][Tile::kStageBlocks * Tile::Format::kBlockBytes];
  alignas(16) float channel_values[Tile::kPanels][2][kBlockRows];  // weight scales, biases
  float token_scale[Tile::kPanels][Tile::kTokens];
  Barriers<Tile> barriers;
  // If the CTA quantizes tokens: their scales, and the largest magnitude that each warp saw, as
  // bits.
  float quantized_scale[Tile::kQuantizes ? Tile::kTokens : 1];
  uint32_t largest[Tile::kQuantizes ? Tile::kConsumerThreads / 32 : 1];
};

}  // namespace liquidgemm
