// Sums that several have parts of, completed in memory that all of them reach. Integer addition
// makes any order exact.
//
//   complete  k groups that take turns, and the CTAs of a cluster: through staging buffers
//   exchange  the two CTAs of a pair: from registers into what was the other's ring
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/ring.hpp"
#include "liquidgemm/kernel/scheduler.hpp"

namespace liquidgemm {

// A thread's sums of eight tokens: two tokens of two channels.
template <class Accumulator>
CUTE_DEVICE int4 octet_of(Accumulator const& acc, int octet) {
  return {acc(4 * octet), acc(4 * octet + 1), acc(4 * octet + 2), acc(4 * octet + 3)};
}

template <class Tile>
class PartialSums {
  using Barrier = cutlass::arch::ClusterBarrier;
  using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

 public:
  static constexpr int kThreads = Tile::kKGroups * kWarpGroupThreads;  // that share a panel
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kNoChunks = 2;  // a parity that no chunk has

  CUTE_DEVICE PartialSums(KernelParams const& params, SharedStorage<Tile>& shared, int panel)
      : params_(params), shared_(shared), panel_(panel) {}

  CUTE_DEVICE static void init_barriers(SharedStorage<Tile>& shared, int split_k) {
    Barrier::init(&shared.multiplied, Tile::kConsumerThreads / 32);
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      Barrier::init(&shared.received[panel], 1);
      Barrier::init(&shared.drained[panel], kWarps * split_k);
    }
  }

  CUTE_DEVICE static int thread() { return threadIdx.x % kThreads; }  // within the panel
  CUTE_DEVICE void panel_barrier() const {
    cutlass::arch::NamedBarrier::arrive_and_wait(kThreads, panel_);
  }
  // This thread's place in an octet's staging buffer.
  CUTE_DEVICE int4* staged(int index) const {
    return reinterpret_cast<int4*>(shared_.staging[panel_]) + index * kWarpGroupThreads +
           threadIdx.x % kWarpGroupThreads;
  }

  // A tile that a pair shares along K, its last one. The two CTAs own the chunks of tokens in
  // turns: each sends those of the other's parity from its registers, to where that one's ring was,
  // and adds what it gets to its own.
  template <class Accumulator>
  CUTE_DEVICE void exchange(Accumulator& acc, int tokens, int foreign_chunks) const {
    constexpr int kOctets = Tile::kChunkTokens / 8;
    const int peer = Scheduler<Tile>::rank() ^ 1;
    uint64_t* const received = &shared_.received[panel_];
    __syncwarp();
    arrive_at_cluster_if(threadIdx.x % 32 == 0, &shared_.multiplied, peer);
    if (thread() == 0) {
      const int chunks = (tokens + Tile::kChunkTokens - 1) / Tile::kChunkTokens;
      TransactionBarrier::arrive_and_expect_tx(received,
                                               (chunks + peer) / 2 * kOctets * Tile::kVectorBytes);
    }
    int4* const parts =
        reinterpret_cast<int4*>(&shared_.tokens[0][0] + panel_ * Tile::kExchangeBytes) +
        threadIdx.x % kWarpGroupThreads;
    const uint32_t to = peer_address(parts, peer);
    const uint32_t barrier = peer_address(received, peer);
    Barrier::wait(&shared_.multiplied, 0);
    CUTE_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      if (chunk % 2 == foreign_chunks && chunk * Tile::kChunkTokens < tokens) {
        CUTE_UNROLL
        for (int i = 0; i < kOctets; ++i)
          store_at_cluster(to + (chunk / 2 * kOctets + i) * Tile::kVectorBytes,
                           octet_of(acc, chunk * kOctets + i), barrier);
      }
    }
    Barrier::wait(received, 0);
    CUTE_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      if (chunk % 2 != foreign_chunks && chunk * Tile::kChunkTokens < tokens) {
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

  // Sums of which k groups have parts, and CTAs of a cluster: parts meet in shared memory. The
  // octets are dealt out in turns to the k groups, which add up the parts of their CTA, and to the
  // CTAs, which add up those of all. Afterwards all threads of the panel are in step, and can read
  // what they have staged before.
  template <class Accumulator>
  CUTE_DEVICE void complete(int item, Accumulator const& acc, int k_group) const {
    stage_parts(acc, k_group);
    if (params_.log2_split == 0)
      return;
    const int rank = cute::block_rank_in_cluster();
    const int senders = params_.split_k() - 1;
    uint64_t* const received = &shared_.received[panel_];
    uint64_t* const drained = &shared_.drained[panel_];
    Barrier::wait(drained, phase(item) ^ 1);
    if (thread() == 0) {
      const int octets = (Tile::kOctets + senders - rank) >> params_.log2_split;
      TransactionBarrier::arrive_and_expect_tx(received, octets * senders * Tile::kVectorBytes);
    }
    CUTE_NO_UNROLL
    for (int i = k_group; i < Tile::kOctets; i += Tile::kKGroups) {
      const int owner = owning_rank(i);
      if (owner != rank) {
        int4* const place = peer_part((i >> params_.log2_split) * senders + rank - (rank > owner));
        store_at_cluster(peer_address(place, owner), sum_of_groups(i),
                         peer_address(received, owner));
      }
    }
    Barrier::wait(received, phase(item));
  }

  // Calls use(octet, sum) for those that this thread's group and CTA own.
  template <class Use>
  CUTE_DEVICE void for_each_owned(int k_group, Use const& use) const {
    const int rank = cute::block_rank_in_cluster();
    const int senders = params_.split_k() - 1;
    CUTE_NO_UNROLL
    for (int i = k_group; i < Tile::kOctets; i += Tile::kKGroups) {
      if (owning_rank(i) == rank) {
        int4 sum = sum_of_groups(i);
        int4 const* const parts = peer_part((i >> params_.log2_split) * senders);
        CUTE_NO_UNROLL
        for (int sender = 0; sender < senders; ++sender)
          add(sum, parts[sender * kWarpGroupThreads]);
        use(i, sum);
      }
    }
  }

  // The cluster may send the next tile's parts once all warps have said so: those of the receiver
  // too, or a CTA that owns nothing, and so waits for nothing, could complete the phase after the
  // one that its peer waits for. After the last tile nobody does, or waits for it.
  CUTE_DEVICE void release(bool last) const {
    if (params_.log2_split > 0 && !last) {
      __syncwarp();
      const int lane = threadIdx.x % 32;
      arrive_at_cluster_if(lane < params_.split_k(), &shared_.drained[panel_], lane);
    }
  }

 private:
  // This group's parts, for sum_of_groups to find.
  template <class Accumulator>
  CUTE_DEVICE void stage_parts(Accumulator const& acc, int k_group) const {
    CUTE_UNROLL
    for (int i = 0; i < Tile::kOctets; ++i) {
      const int owner = i % Tile::kKGroups;
      if (!Tile::kInPlace)
        *group_part(i, k_group) = octet_of(acc, i);
      else if (owner != k_group)
        *group_part(i, k_group - (k_group > owner)) = octet_of(acc, i);
    }
    panel_barrier();  // the parts, and the scales
    CUTE_UNROLL
    for (int i = 0; Tile::kInPlace && i < Tile::kOctets; ++i) {
      if (i % Tile::kKGroups == k_group) {
        int4 sum = octet_of(acc, i);
        CUTE_UNROLL
        for (int part = 0; part < Tile::kPartsPerOctet; ++part)
          add(sum, *group_part(i, part));
        *group_part(i, 0) = sum;
      }
    }
  }

  // Of split_k octets in a row every CTA owns one. Which one changes from round to round of the
  // groups, where they would meet the same one again: each of them is to send as much as others do.
  CUTE_DEVICE int owning_rank(int i) const {
    constexpr int kLog2Groups = cute::log_2(unsigned(Tile::kKGroups));
    const int round = Tile::kKGroups % 2 ? 0 : i >> max(params_.log2_split, kLog2Groups);
    return (i + round) & (params_.split_k() - 1);
  }
  static_assert(Tile::kOctets < kMostSplit || Tile::kOctets % kMostSplit == 0,
                "every CTA owns as many octets as in complete()");

  // This thread's place in the buffer of octet i and a sender.
  CUTE_DEVICE int4* group_part(int i, int group) const {
    return staged(i * Tile::kPartsPerOctet + group);
  }
  CUTE_DEVICE int4* peer_part(int index) const {
    return staged(Tile::kOctets * Tile::kPartsPerOctet + index);
  }

  CUTE_DEVICE int4 sum_of_groups(int i) const {
    int4 sum = *group_part(i, 0);
    CUTE_UNROLL
    for (int group = 1; !Tile::kInPlace && group < Tile::kPartsPerOctet; ++group)
      add(sum, *group_part(i, group));
    return sum;
  }

  CUTE_DEVICE static void add(int4& sum, int4 const& part) {
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }

  // Of `received` and `drained`: once per tile.
  CUTE_DEVICE static uint32_t phase(int item) { return item & 1; }

  KernelParams const& params_;
  SharedStorage<Tile>& shared_;
  int panel_;
};

}  // namespace liquidgemm
