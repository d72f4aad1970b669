// Partial sums of a tile that the two CTAs of a pair share along K, their last one.
//
// The CTAs own alternate chunks of tokens. Each sends its sums of the peer's chunks from registers
// to where the peer's ring was, and adds what it receives to its own:
//
//   chunk of tokens    0    1    2    3
//   owner CTA          0    1    0    1
//   sent by CTA        1    0    1    0
//
// Barriers: `multiplied` says that the peer's ring is free, `received` counts the bytes of its
// sums. Both complete once per launch.
#pragma once

#include <cutlass/arch/barrier.h>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/formats/block_layout.hpp"
#include "liquidgemm/kernel/octets.hpp"
#include "liquidgemm/kernel/storage.hpp"

namespace liquidgemm {

// Which chunks of tokens a CTA completes and stores. The value is the parity of the others.
enum class Ownership : int { kOddChunks = 0, kEvenChunks = 1, kAllChunks = 2 };

CUTE_DEVICE bool owns(Ownership ownership, int chunk) {
  return chunk % 2 != static_cast<int>(ownership);
}

// Of a tile that a pair shares: CTA 0 has the even chunks, CTA 1 the odd ones.
CUTE_DEVICE Ownership alternate_chunks() {
  return static_cast<Ownership>(cta_rank() ^ 1);
}

template <class Tile, class Accumulator>
CUTE_DEVICE void exchange_in_pair(
    SharedStorage<Tile>& shared, int panel, Ownership ownership, int tokens, Accumulator& acc) {
  using Barrier = cutlass::arch::ClusterBarrier;
  using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kOctets = Tile::kChunkTokens / 8;
  const int peer = cta_rank() ^ 1;
  uint64_t* const received = &shared.barriers.received[panel];
  __syncwarp();
  arrive_at_cluster_if(threadIdx.x % 32 == 0, &shared.barriers.multiplied, peer);
  if (panel_thread<Tile>() == 0) {
    const int chunks = (tokens + Tile::kChunkTokens - 1) / Tile::kChunkTokens;
    TransactionBarrier::arrive_and_expect_tx(received,
                                             (chunks + peer) / 2 * kOctets * Tile::kVectorBytes);
  }
  int4* const parts = reinterpret_cast<int4*>(shared.tokens + panel * Tile::kExchangeBytes) +
                      threadIdx.x % kWarpGroupThreads;
  const uint32_t to = peer_address(parts, peer);
  const uint32_t barrier = peer_address(received, peer);
  Barrier::wait(&shared.barriers.multiplied, 0);
  CUTE_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    if (!owns(ownership, chunk) && chunk * Tile::kChunkTokens < tokens) {
      CUTE_UNROLL
      for (int i = 0; i < kOctets; ++i)
        store_at_cluster(to + (chunk / 2 * kOctets + i) * Tile::kVectorBytes,
                         octet_of(acc, chunk * kOctets + i), barrier);
    }
  }
  Barrier::wait(received, 0);
  CUTE_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    if (owns(ownership, chunk) && chunk * Tile::kChunkTokens < tokens) {
      CUTE_UNROLL
      for (int i = 0; i < kOctets; ++i) {
        const int octet = chunk * kOctets + i;
        const int4 part = parts[(chunk / 2 * kOctets + i) * kWarpGroupThreads];
        acc(4 * octet) += part.x;
        acc(4 * octet + 1) += part.y;
        acc(4 * octet + 2) += part.z;
        acc(4 * octet + 3) += part.w;
      }
    }
  }
}

}  // namespace liquidgemm
