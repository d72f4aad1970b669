// The ring of pipeline stages between the producers and the consumer warp-groups, and shared memory
// as a whole.
#pragma once

#include <cstdint>

#include "liquidgemm/kernel/tile.hpp"

namespace liquidgemm {

template <class Tile>
struct alignas(1024) SharedStorage {
  // Tokens first: the 128-byte swizzle wants 1024-byte alignment.
  alignas(1024) int8_t tokens[Tile::kStages * Tile::kStageTokenBytes + Tile::kQuantizedBytes];
  alignas(1024) uint8_t staging[Tile::kPanels][Tile::kStagingBytes];  // swizzled, too
  alignas(16) uint8_t weights[Tile::kStages][Tile::kPanels][Tile::kStageBlocks * kBlockBytes];
  alignas(16) float channel_values[Tile::kPanels][2][kBlockRows];  // weight scales, biases
  float token_scale[Tile::kPanels][Tile::kTokens];
  // full: one arrival of each producer, plus the bytes of the stage. empty: kReleasesPerWarp
  // arrivals of each warp that read it.
  alignas(8) uint64_t full[Tile::kStages];
  uint64_t empty[Tile::kStages];
  // The weights alone of the first stages: one arrival, and their bytes.
  uint64_t ahead[Tile::kStagesAhead ? Tile::kStagesAhead * Tile::kKGroups : 1];
  // Split K: the other CTAs' parts of what this one sums up have arrived (counted in bytes) /
  // every CTA has read what this one sent (one arrival per reading warp).
  uint64_t received[Tile::kPanels];
  uint64_t drained[Tile::kPanels];
  uint64_t multiplied;  // pairs: the other CTA's warps need their ring no more
  // Of tokens that the CTA quantizes: x has been read (one arrival), their scales, and of every
  // warp the largest bits that it saw.
  uint64_t read;
  float quantized_scale[Tile::kQuantizes ? Tile::kTokens : 1];
  uint32_t largest[Tile::kQuantizes ? Tile::kConsumerThreads / 32 : 1];
};

// Arrivals at `empty` per warp. One lane speaks for its warp, whose lanes have all read when it
// gets there. racecheck cannot see that (the __syncwarp in between leaves no instruction), so the
// build that it examines lets every lane arrive: see `make sanitize`.
#ifdef LIQUIDGEMM_EVERY_LANE_ARRIVES
inline constexpr int kReleasesPerWarp = 32;
#else
inline constexpr int kReleasesPerWarp = 1;
#endif

// A position in the ring. Both sides walk the same sequence of stages; a consumer may step over
// stages of other groups.
template <class Tile>
struct RingState {
  int slot;
  uint32_t phase;

  CUTE_DEVICE explicit RingState(int stages_done)
      : slot(stages_done % Tile::kStages), phase(stages_done / Tile::kStages % 2) {}

  CUTE_DEVICE void advance(int stages) {  // stages <= Tile::kStages
    slot += stages;
    if (slot >= Tile::kStages) {
      slot -= Tile::kStages;
      phase ^= 1;
    }
  }

  CUTE_DEVICE int behind(int stages) const {  // the slot that many stages ago
    return slot >= stages ? slot - stages : slot - stages + Tile::kStages;
  }
};

}  // namespace liquidgemm
