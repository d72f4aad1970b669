// Arriving at barriers under a condition, and reaching the shared memory of the other CTAs of a
// cluster.
#pragma once

#include <cstdint>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/util.hpp>
#include <cute/config.hpp>

namespace liquidgemm {

// Of this CTA within its cluster; 0 without one.
CUTE_DEVICE int cta_rank() {
  return cute::block_rank_in_cluster();
}

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

// From another CTA's shared memory, or this one's: see peer_address.
CUTE_DEVICE int load_at_cluster(uint32_t address) {
  int value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
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

// Writes 16 bytes to a CTA of the cluster and counts them at that CTA's barrier. Threads that wait
// at the barrier see them without a fence on either side. `address` and `barrier` are the peer's,
// see peer_address.
CUTE_DEVICE void store_at_cluster(uint32_t address, int4 value, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}

}  // namespace liquidgemm
