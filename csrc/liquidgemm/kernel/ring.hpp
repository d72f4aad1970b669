// The ring of pipeline stages between the producer warp and the consumer warp-groups, and shared
// memory as a whole.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "liquidgemm/kernel/tile.hpp"

namespace liquidgemm {

// One PTX instruction per wrapper, for what CUTLASS's barriers do not offer: predication and
// cluster scope.
CUTE_DEVICE void arrive_if(bool condition, uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}\n" ::"r"(cute::cast_smem_ptr_to_uint(barrier)),
      "r"(static_cast<int>(condition))
      : "memory");
}

CUTE_DEVICE void arrive_at_cluster(uint64_t* barrier, int cta_rank) {
  // release.cluster: what this thread wrote (or was handed by a barrier) is visible to whoever
  // waits at the peer.
  asm volatile(
      "{\n"
      ".reg .b32 peer;\n"
      "mapa.shared::cluster.u32 peer, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [peer];\n"
      "}\n" ::"r"(cute::cast_smem_ptr_to_uint(barrier)),
      "r"(cta_rank)
      : "memory");
}

CUTE_DEVICE bool try_wait_cluster(uint64_t* barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(cute::cast_smem_ptr_to_uint(barrier)), "r"(phase)
      : "memory");
  return done;
}

CUTE_DEVICE void wait_cluster(uint64_t* barrier, uint32_t phase) {
  while (!try_wait_cluster(barrier, phase)) {
  }
}

template <class Tile>
struct alignas(1024) SharedStorage {
  // Tokens first: the 128-byte swizzle wants 1024-byte alignment.
  alignas(1024) int8_t tokens[Tile::kStages][Tile::kStageTokenBytes];
  alignas(16) uint8_t weights[Tile::kStages][Tile::kPanels][Tile::kStageBlocks * kBlockBytes];
  alignas(16) float channel_values[Tile::kPanels][2][kBlockRows];  // weight scales, biases
  float token_scale[Tile::kPanels][Tile::kTokens];
  alignas(
      16) int32_t staging[Tile::kPanels][Tile::kKGroups][Tile::kChunkTokens][Tile::kStagingPitch];
  // full: the producer's one arrival plus the bytes of the stage. empty: one arrival per warp that
  // read it.
  alignas(8) uint64_t full[Tile::kStages];
  uint64_t empty[Tile::kStages];
  // Split K: partial sums of every CTA of the cluster are staged / have been read. One arrival per
  // warp and CTA.
  uint64_t staged[Tile::kPanels];
  uint64_t drained[Tile::kPanels];
};

// A position in the ring. Both sides walk the same sequence of stages; a consumer may step over
// stages of other groups.
template <class Tile>
struct RingState {
  int slot = 0;
  uint32_t phase = 0;

  CUTE_DEVICE void advance(int stages) {  // stages <= Tile::kStages
    slot += stages;
    if (slot >= Tile::kStages) {
      slot -= Tile::kStages;
      phase ^= 1;
    }
  }

  CUTE_DEVICE void skip(int stages) {  // any number
    const int laps = (slot + stages) / Tile::kStages;
    slot = (slot + stages) - laps * Tile::kStages;
    phase ^= laps & 1;
  }
};

}  // namespace liquidgemm
