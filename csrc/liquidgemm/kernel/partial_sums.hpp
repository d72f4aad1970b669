// Sums of which k groups have parts, and CTAs of a cluster, completed in shared memory. Integer
// addition makes any order exact.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/kernel/octets.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/protocol.hpp"
#include "liquidgemm/kernel/storage.hpp"

namespace liquidgemm {

template <class Tile>
class PartialSums {
  using Barrier = cutlass::arch::ClusterBarrier;
  using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

 public:
  static constexpr int kThreads = Tile::kKGroups * kWarpGroupThreads;  // that share a panel
  static constexpr int kWarps = kThreads / 32;

  CUTE_DEVICE PartialSums(ClusterParams const& params, SharedStorage<Tile>& shared, int panel)
      : params_(params), shared_(shared), panel_(panel) {}

  CUTE_DEVICE static int thread() { return threadIdx.x % kThreads; }  // within the panel
  CUTE_DEVICE void panel_barrier() const { liquidgemm::panel_barrier<Tile>(panel_); }
  // This thread's place in an octet's staging buffer.
  CUTE_DEVICE int4* staged(int index) const {
    return reinterpret_cast<int4*>(shared_.staging[panel_]) + index * kWarpGroupThreads +
           threadIdx.x % kWarpGroupThreads;
  }

  // Sums of which k groups have parts, and CTAs of a cluster. The octets are dealt out in turns to
  // the k groups, and turn by turn to the CTAs. Each group adds up its CTA's parts of its octets,
  // from shared memory to its own in registers, and sends the sums that other CTAs own.
  static constexpr int kTurns = Tile::kOctetsPerGroup;
  using Octets = cute::array<int4, kTurns>;  // a group's, one per turn
  // Whether every group has several: then they overlap, if the code has no branches between them.
  static constexpr bool kOverlaps = Tile::kOctets >= 2 * Tile::kKGroups;

  CUTE_DEVICE static int octet_of_turn(int turn, int k_group) {
    return turn * Tile::kKGroups + k_group;
  }
  // Whether this CTA is to store it; the last turn may not have one for every group.
  CUTE_DEVICE bool owns(int turn, int k_group) const {
    return owner(turn) == cta_rank() && exists(turn, k_group);
  }

  // This thread's place in another group's part of an octet, which nobody but its own reads.
  CUTE_DEVICE int4* group_part(int octet, int sender) const {
    return staged(octet * (Tile::kKGroups - 1) + sender);
  }

  // This group's complete sums; those that the CTA does not own are undefined. All threads of the
  // panel are in step by then, and can read what they have staged before.
  template <class Accumulator>
  CUTE_DEVICE Octets complete(int item, Accumulator const& acc, int k_group) const {
    stage_parts(acc, k_group);
    panel_barrier();  // the parts, and the scales
    Octets sums;
    if (params_.log2_split > 0) {
      exchange_turns(item, acc, sums, k_group);
    } else {
      CUTE_UNROLL
      for (int turn = 0; turn < kTurns; ++turn) {
        if (kOverlaps || exists(turn, k_group))
          sums[turn] = sum_of_groups(acc, turn, k_group);
      }
    }
    return sums;
  }

  // The cluster may send the next tile's parts once all warps have said so: those of the receiver
  // too, or a CTA that owns nothing, and so waits for nothing, could complete the phase after the
  // one that its peer waits for. After the last tile nobody does, or waits for it.
  CUTE_DEVICE void release(bool last) const {
    if (params_.log2_split > 0 && !last) {
      __syncwarp();
      const int lane = threadIdx.x % 32;
      arrive_at_cluster_if(lane < params_.split_k(), &shared_.barriers.drained[panel_], lane);
    }
  }

 private:
  CUTE_DEVICE int owner(int turn) const { return turn & (params_.split_k() - 1); }
  CUTE_DEVICE static bool exists(int turn, int k_group) {
    return octet_of_turn(turn, k_group) < Tile::kOctets;
  }

  // This group's parts of what the others add up.
  template <class Accumulator>
  CUTE_DEVICE void stage_parts(Accumulator const& acc, int k_group) const {
    CUTE_UNROLL
    for (int i = 0; i < Tile::kOctets; ++i) {
      const int group = i % Tile::kKGroups;
      if (group != k_group)
        *group_part(i, k_group - (k_group > group)) = octet_of(acc, i);
    }
  }

  template <class Accumulator>
  CUTE_DEVICE int4 sum_of_groups(Accumulator const& acc, int turn, int k_group) const {
    int4 sum{};
    CUTE_UNROLL
    for (int group = 0; group < Tile::kKGroups; ++group) {
      if (group == k_group && exists(turn, group))
        sum = octet_of(acc, octet_of_turn(turn, group));
    }
    const int octet = min(octet_of_turn(turn, k_group), Tile::kOctets - 1);
    CUTE_UNROLL
    for (int sender = 0; sender < Tile::kKGroups - 1; ++sender)
      add(sum, *group_part(octet, sender));
    return sum;
  }

  template <class Accumulator>
  CUTE_DEVICE void exchange_turns(int item,
                                  Accumulator const& acc,
                                  Octets& sums,
                                  int k_group) const {
    const int rank = cta_rank();
    const int senders = params_.split_k() - 1;
    uint64_t* const received = &shared_.barriers.received[panel_];
    uint64_t* const drained = &shared_.barriers.drained[panel_];
    Barrier::wait(drained, phase(item) ^ 1);
    if (thread() == 0) {
      int octets = 0;
      CUTE_UNROLL
      for (int turn = 0; turn < kTurns; ++turn) {
        if (owner(turn) == rank)
          octets += min(Tile::kKGroups, Tile::kOctets - turn * Tile::kKGroups);
      }
      TransactionBarrier::arrive_and_expect_tx(received, octets * senders * Tile::kVectorBytes);
    }
    CUTE_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      if (owner(turn) != rank && exists(turn, k_group)) {
        int4* const place = peer_part(turn, k_group, rank - (rank > owner(turn)));
        store_at_cluster(peer_address(place, owner(turn)), sum_of_groups(acc, turn, k_group),
                         peer_address(received, owner(turn)));
      }
    }
    CUTE_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      if (owns(turn, k_group))
        sums[turn] = sum_of_groups(acc, turn, k_group);
    }
    Barrier::wait(received, phase(item));
    CUTE_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      CUTE_NO_UNROLL
      for (int sender = 0; sender < senders && owns(turn, k_group); ++sender)
        add(sums[turn], *peer_part(turn, k_group, sender));
    }
  }

  // This thread's place in another CTA's part of a turn.
  CUTE_DEVICE int4* peer_part(int turn, int k_group, int sender) const {
    const int octet = octet_of_turn(turn >> params_.log2_split, k_group);
    return staged(Tile::kOctets * (Tile::kKGroups - 1) + octet * (params_.split_k() - 1) + sender);
  }

  CUTE_DEVICE static void add(int4& sum, int4 const& part) {
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }

  // Of `received` and `drained`: once per tile.
  CUTE_DEVICE static uint32_t phase(int item) { return item & 1; }

  ClusterParams const& params_;
  SharedStorage<Tile>& shared_;
  int panel_;
};

}  // namespace liquidgemm
