// Partial sums of the CTAs of a cluster, which share a tile along K. The turns of the k groups are
// dealt out to the CTAs; each group adds up its CTA's parts of its octets, and sends the sums that
// other CTAs own:
//
//   turn    0    1    2    3        split K by 2
//   CTA     0    1    0    1
//
// Barriers: `drained` says that a CTA has read what it received for the tile before, `received`
// counts the bytes of this one's. Both complete once per tile.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/reduce/k_groups.hpp"

namespace liquidgemm {

template <class Tile>
class ClusterSums : public GroupSums<Tile> {
  using Base = GroupSums<Tile>;
  using Barrier = cutlass::arch::ClusterBarrier;
  using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;
  using Base::add, Base::panel_, Base::shared_;

 public:
  using Base::exists, Base::kOverlaps, Base::kTurns, Base::octet_of_turn, Base::staged,
      Base::sum_of_groups;
  using typename Base::Octets;

  CUTE_DEVICE ClusterSums(ClusterParams const& params, SharedStorage<Tile>& shared, int panel)
      : Base(shared, panel), params_(params) {}

  CUTE_DEVICE bool is_whole() const { return params_.log2_split == 0; }  // no CTA shares the tile

  // Whether this CTA is to store an octet; the last turn may not have one for every group.
  CUTE_DEVICE bool owns(int turn, int k_group) const {
    return owner(turn) == cta_rank() && exists(turn, k_group);
  }

  // This group's complete sums; those that the CTA does not own are undefined. All threads of the
  // panel are in step by then, and can read what they have staged before.
  template <class Accumulator>
  CUTE_DEVICE Octets complete(int item, Accumulator const& acc, int k_group) const {
    this->stage_parts(acc, k_group);
    panel_barrier<Tile>(panel_);  // the parts, and the scales
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

  // The cluster may send the next tile's parts once all warps have arrived, the receiver's own too.
  // A CTA that owns nothing waits for nothing: without the receiver's arrivals it could complete
  // the phase after the one that its peer waits for. After the last tile no warp arrives, and none
  // waits.
  CUTE_DEVICE void release(bool last) const {
    if (params_.log2_split > 0 && !last) {
      __syncwarp();
      const int lane = threadIdx.x % 32;
      arrive_at_cluster_if(lane < params_.split_k(), &shared_.barriers.drained[panel_], lane);
    }
  }

 private:
  CUTE_DEVICE int owner(int turn) const { return turn & (params_.split_k() - 1); }

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
    if (panel_thread<Tile>() == 0) {
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

  // Of `received` and `drained`.
  CUTE_DEVICE static uint32_t phase(int item) { return item & 1; }

  ClusterParams const& params_;
};

}  // namespace liquidgemm
