// Everything that follows from a tile's shape, the weights' format and the activations' type.
#pragma once

#include <cstdint>
#include <type_traits>

#include "liquidgemm/formats/block_layout.hpp"
#include "liquidgemm/kernel/tile_shape.hpp"

namespace liquidgemm {

// Parts of octets that one CTA of a cluster receives at most: one from every other CTA of each
// octet that it owns. A CTA owns every split-th octet of each k group: see reduce/cluster.hpp.
constexpr int most_received_octets(int octets, int k_groups) {
  const int per_group = (octets + k_groups - 1) / k_groups;
  int most = 0;
  for (int split : kSplits) {
    const int owned = (per_group + split - 1) / split * k_groups;
    const int received = (split - 1) * (owned < octets ? owned : octets);
    most = received > most ? received : most;
  }
  return most;
}

inline constexpr int kSharedBytesPerSm = 228 * 1024;  // sm_90
inline constexpr int kReservedBytesPerCta = 1024;     // of those, by the system

// Input: int8_t, or for tiles that quantize the 16-bit type of the activations.
template <TileShape shape, class FormatT, class InputT = int8_t>
struct Tile {
  static constexpr TileShape kShape = shape;
  using Format = FormatT;
  using Input = InputT;
  static constexpr bool kQuantizes = !std::is_same_v<Input, int8_t>;
  static_assert(!kQuantizes || kShape.can_quantize());
  static constexpr int kTokens = kShape.tokens;
  static constexpr int kPanels = kShape.panels;
  static constexpr int kKGroups = kShape.k_groups;
  static constexpr int kStageBlocks = kShape.stage_blocks;
  static constexpr int kStageK = kStageBlocks * kBlockK;

  static constexpr int kCtasPerSm = kShape.ctas_per_sm;
  static constexpr int kConsumerGroups = kPanels * kKGroups;
  static constexpr int kConsumerThreads = kConsumerGroups * kWarpGroupThreads;
  static constexpr int kPanelThreads = kKGroups * kWarpGroupThreads;
  static constexpr int kThreads =
      kConsumerThreads + kWarpGroupThreads;  // and the producer's warp-group

  // Registers per thread: setmaxnreg moves registers from the producer to the consumers. Each of
  // the four quarters of an SM runs one warp of every warp-group. A quarter has 512 registers per
  // lane and divides them equally among its warps at launch.
  static constexpr int kLaunchRegisters = 512 / kCtasPerSm / (kConsumerGroups + 1) / 8 * 8;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters =
      (kLaunchRegisters * (kConsumerGroups + 1) - kProducerRegisters) / kConsumerGroups / 8 * 8;

  static constexpr bool kPairs = kShape.can_pair();
  // Tiles of products by slots, which alone quantize and hold nothing ahead, store one row of many:
  // see schedule/slots.hpp.
  static constexpr bool kSkipsRows = kQuantizes && kShape.stages_ahead == 0;

  // Epilogue. Accumulators are handled in octets of tokens: four values per thread, 16 bytes. Parts
  // of sums meet in shared memory, those of a panel's k groups and those of a cluster's CTAs.
  static constexpr int kOctets = kTokens / 8;
  static constexpr int kVectorBytes = 16 * kWarpGroupThreads;  // an octet of one panel
  // Every k group adds up some of the octets, of which each of the other groups stages a part.
  static constexpr int kOctetsPerGroup = (kOctets + kKGroups - 1) / kKGroups;
  static constexpr int kPartBytes =
      (kOctets * (kKGroups - 1) + most_received_octets(kOctets, kKGroups)) * kVectorBytes;
  // Groups that hold whole sums store them in chunks of tokens; of 16-bit results a chunk is the
  // box of a TMA store. The stores proceed while the next tile is computed. There is a buffer per
  // chunk, or as many as leave five stages to the ring: with four stages the loss exceeds the gain
  // of the stores. With only two buffers for many chunks the group would wait for TMA, so it stores
  // rows itself.
  static constexpr int kChunkTokens = kShape.store_tokens();
  static constexpr int kChunks = kTokens / kChunkTokens;
  static constexpr int kChunkBytes = kChunkTokens * kBlockRows * 2;

  static constexpr int kSharedBytes = kSharedBytesPerSm / kCtasPerSm - kReservedBytesPerCta;

  static constexpr int kStageWeightBytes = kPanels * kStageBlocks * Format::kBlockBytes;
  // Tokens that the CTA quantizes itself are kept for all of its tiles, outside of the ring.
  static constexpr int kStageTokenBytes = kQuantizes ? 0 : kTokens * kStageK;
  static constexpr int kQuantizedBytes =
      kQuantizes ? most_quantized_bytes(kCtasPerSm) + kTokens * 16 : 0;
  static constexpr int kScaleBytes = kPanels * (kTokens + 2 * kBlockRows) * 4;
  static constexpr int kBarrierBytes =
      2048;  // generous: 16 bytes per stage, 16 per panel, and alignment
  static constexpr int stages_beside(int staging_bytes) {
    return (kSharedBytes - kQuantizedBytes - kPanels * staging_bytes - kScaleBytes -
            kBarrierBytes) /
           (kStageWeightBytes + kStageTokenBytes);
  }
  static constexpr int most_buffers() {
    int buffers = kChunks;
    while (buffers > 2 && stages_beside(buffers * kChunkBytes) < 5)
      --buffers;
    return buffers;
  }
  static constexpr int kChunkBuffers = kPairs ? most_buffers() : 0;
  static constexpr bool kStoresByTma = kPairs && (kChunkBuffers > 2 || kChunkBuffers == kChunks);
  static constexpr int kStagingBytes = kPairs ? kChunkBuffers * kChunkBytes : kPartBytes;
  static constexpr int kStagesThatFit = stages_beside(kStagingBytes);
  // A multiple of the k groups, so that a slot always belongs to the same group. If another group
  // used a slot next, it could wait for that load while the present one is still in flight.
  // Barriers know the parity of a phase only, so that a wait for the phase after next passes at
  // once.
  static constexpr int kStages = kStagesThatFit / kKGroups * kKGroups;

  // Stages of each group that are held in registers before its first tokens arrive. A group that
  // quantizes has no registers for them, since it holds activations.
  static constexpr int kStagesAhead = kQuantizes ? 0 : kShape.stages_ahead;

  // A pair exchanges partial sums in the memory of the ring: half of a panel's chunks, rounded up.
  static constexpr int kExchangeBytes = (kChunks + 1) / 2 * kChunkTokens / 8 * kVectorBytes;
  static_assert(!kPairs || kPanels * kExchangeBytes <= kStages * kStageTokenBytes);

  static_assert(kStagesAhead == 0 || (kPanels == 1 && kStagesAhead * kKGroups <= kStages));
  static_assert(kStages >= 2 * kKGroups, "while one stage is multiplied the next is loaded");
  static_assert(kStageBlocks % 2 == 0,
                "a stage is made of 128-byte rows of activations, and A registers alternate");
  static_assert(kTokens % 8 == 0 && kTokens <= 256);
  static_assert(!kPairs || (kTokens % kChunkTokens == 0 && kChunks > 1),
                "a pair shares the chunks");
  static_assert(kThreads <= 1024);
};

}  // namespace liquidgemm
