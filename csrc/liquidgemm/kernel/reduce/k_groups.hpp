// Partial sums of the k groups of a CTA, completed in shared memory. Integer addition makes any
// order exact.
//
// The octets of tokens are dealt out in turns to the k groups. Each group stages its parts of the
// others' octets, and adds the others' parts of its own to those in its registers:
//
//   octet    0    1    2    3    4    5        3 k groups
//   turn     0    0    0    1    1    1
//   group    0    1    2    0    1    2
#pragma once

#include "liquidgemm/kernel/octets.hpp"
#include "liquidgemm/kernel/protocol.hpp"
#include "liquidgemm/kernel/storage.hpp"

namespace liquidgemm {

template <class Tile>
class GroupSums {
 public:
  static constexpr int kTurns = Tile::kOctetsPerGroup;
  using Octets = cute::array<int4, kTurns>;  // a group's, one per turn
  // Whether every group has several: then they overlap, if the code has no branches between them.
  static constexpr bool kOverlaps = Tile::kOctets >= 2 * Tile::kKGroups;

  CUTE_DEVICE GroupSums(SharedStorage<Tile>& shared, int panel) : shared_(shared), panel_(panel) {}

  CUTE_DEVICE static int octet_of_turn(int turn, int k_group) {
    return turn * Tile::kKGroups + k_group;
  }
  // The last turn may not have an octet for every group.
  CUTE_DEVICE static bool exists(int turn, int k_group) {
    return octet_of_turn(turn, k_group) < Tile::kOctets;
  }

  // This thread's place in an octet's staging buffer.
  CUTE_DEVICE int4* staged(int index) const {
    return reinterpret_cast<int4*>(shared_.staging[panel_]) + index * kWarpGroupThreads +
           threadIdx.x % kWarpGroupThreads;
  }
  // This thread's place in another group's part of an octet, which it alone reads.
  CUTE_DEVICE int4* group_part(int octet, int sender) const {
    return staged(octet * (Tile::kKGroups - 1) + sender);
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

 protected:
  CUTE_DEVICE static void add(int4& sum, int4 const& part) {
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }

  SharedStorage<Tile>& shared_;
  int panel_;
};

}  // namespace liquidgemm
