// One PTX instruction per function.
#pragma once

#include <cstdint>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/config.hpp>

#include "liquidgemm/common/shared_address.hpp"

namespace liquidgemm::attention {

// Whether the bytes of a factor have a sign.
template <bool kSignedA, bool kSignedB>
CUTE_DEVICE void mma(int (&sum)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
#define LIQUIDGEMM_MMA(TYPES)                                                \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." TYPES                         \
      ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kSignedA && kSignedB)
    LIQUIDGEMM_MMA("s8.s8");
  else if constexpr (kSignedA)
    LIQUIDGEMM_MMA("s8.u8");
  else if constexpr (kSignedB)
    LIQUIDGEMM_MMA("u8.s8");
  else
    LIQUIDGEMM_MMA("u8.u8");
#undef LIQUIDGEMM_MMA
}

// A matrix of 8 x 8 elements of 16 bits: lane (g, t) has elements 2t and 2t + 1 of row g, and gets
// those of column g.
CUTE_DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

inline constexpr float kLog2E = 1.4426950408889634f;  // scores meet exp2 in units of it

CUTE_DEVICE float exp2_approximate(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// What createpolicy.fractional.L2::evict_first gives for all of it, a constant as in CUTLASS: held
// in registers, the policy would cost the largest decode kernels a spill.
constexpr uint64_t kEvictFirst = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

// This and copy_bulk are for what is read once: it leaves the L2 cache first.
CUTE_DEVICE void copy_16_async(uint32_t to, void const* from) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
               "l"(from), "l"(kEvictFirst)
               : "memory");
}

// Of so many bytes, which are counted at the barrier `arrived`.
CUTE_DEVICE void copy_bulk(void* to, void const* from, int bytes, uint64_t* arrived) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(arrived)), "l"(kEvictFirst)
      : "memory");
}

template <int kBytes>
CUTE_DEVICE void copy_async(uint32_t to, void const* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes)
               : "memory");
}

CUTE_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most so many groups of this thread are outstanding.
template <int kGroups>
CUTE_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace liquidgemm::attention
