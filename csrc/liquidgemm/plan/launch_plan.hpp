// What a launch is: everything that is decided before it.
#pragma once

#include <string>

#include "liquidgemm/kernel/tile_shape.hpp"
#include "liquidgemm/plan/problem.hpp"

namespace liquidgemm {

// Which kernel runs, and which CTAs form a cluster.
struct Plan {
  TileShape tile;
  int split_k = 1;     // CTAs of a cluster that share every output tile along K
  bool pairs = false;  // clusters of two: neighbouring tiles, then tiles that both share along K

  constexpr int cluster() const { return pairs ? 2 : split_k; }
  friend bool operator==(Plan const&, Plan const&) = default;
};

// Such as t64_p1_k3_s2_split2.
inline std::string name(Plan const& plan) {
  return name(plan.tile) + (plan.pairs ? "_pairs"
                            : plan.split_k > 1
                                ? std::string("_split") + std::to_string(plan.split_k)
                                : "");
}

// How a plan divides a problem among workers: CTAs, or clusters of them.
struct Division {
  int tile_tokens;  // m tiles are of equal height: no box of TMA lies half outside of x
  int m_tiles;
  int n_tiles;  // with pairs, pairs of tiles
  int stages;   // of a tile, along K
  int workers;
  int whole_rounds;  // of a tile, or a pair of them, per worker
  int split_tiles;   // one per worker, along K

  friend bool operator==(Division const&, Division const&) = default;
};

// Complete: what launches it decides nothing.
struct LaunchPlan {
  Problem problem;
  Activations activations;
  Plan plan;
  Division division;
  int eighths_ahead;  // of the ring, filled with weights before the first activations arrive
  int stages_ahead;   // of each k group, dequantized before the first activations arrive

  // Of a linear layer alone, whose activations are quantized by a kernel before or by this one.
  int launches() const { return activations == Activations::kJustQuantized ? 2 : 1; }
};

}  // namespace liquidgemm
