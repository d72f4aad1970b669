// The ring of pipeline stages between the producers and the consumer warp-groups, and shared memory
// as a whole.
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

// The place in another CTA's shared memory that `pointer` is in this one's.
CUTE_DEVICE uint32_t peer_address(void const* pointer, int cta_rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(cute::cast_smem_ptr_to_uint(pointer)), "r"(cta_rank));
  return address;
}

// At the same barrier of another CTA.
CUTE_DEVICE void arrive_at_peer_if(bool condition, uint64_t* barrier, int cta_rank) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cluster.b64 _, [%0];\n"
      "}\n" ::"r"(peer_address(barrier, cta_rank)),
      "r"(static_cast<int>(condition))
      : "memory");
}

// At the same barrier of another CTA (or this one). Relaxed: it says that this thread has the
// values it read, and publishes nothing. A release would wait for this thread's stores to global
// memory.
CUTE_DEVICE void arrive_at_cluster_if(bool condition, uint64_t* barrier, int cta_rank) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];\n"
      "}\n" ::"r"(peer_address(barrier, cta_rank)),
      "r"(static_cast<int>(condition))
      : "memory");
}

// Writes 16 bytes to a CTA of the cluster and counts them at that CTA's barrier: visible to whoever
// waits there, with no fence on either side. `address` and `barrier` are the peer's, see
// peer_address.
CUTE_DEVICE void store_at_cluster(uint32_t address, int4 value, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}

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
