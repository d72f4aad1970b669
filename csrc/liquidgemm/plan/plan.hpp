// Which configuration runs a problem: a pure function of the sizes and the SM count, printable and
// tested on a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "liquidgemm/common/math.hpp"
#include "liquidgemm/formats/packed_layout.hpp"
#include "liquidgemm/plan/tiles.hpp"
#include "liquidgemm/producers/quantizer_threads.hpp"

namespace liquidgemm {

struct Problem {
  int64_t m, n, k;
  int num_sms;
  double memory_bytes_per_us;  // peak of the GPU
};

struct Plan {
  TileShape tile;
  int split_k = 1;     // CTAs of a cluster that share every output tile along K
  bool pairs = false;  // clusters of two: neighbouring tiles, then tiles that both share along K

  int cluster() const { return pairs ? 2 : split_k; }
  // Clusters of a launch at a time. Where a CTA takes half an SM, the other half is left to the
  // next launch.
  int workers(int num_sms) const { return std::max(1, num_sms / cluster()); }
};

inline std::string name(Plan const& plan) {
  return name(plan.tile) + (plan.pairs         ? "_pairs"
                            : plan.split_k > 1 ? "_split" + std::to_string(plan.split_k)
                                               : "");
}

// Every plan that can be run: see kernel/scheduler.hpp.
inline std::vector<Plan> const& all_plans() {
  static const std::vector<Plan> plans = [] {
    std::vector<Plan> result;
    for (TileShape const& tile : kTileShapes) {
      if (tile.can_pair()) {
        result.push_back({tile});
        if (tile.tokens >= 64)  // below, it is the weights that are loaded
          result.push_back({tile, 1, true});
      } else {
        for (int split_k : kSplits)
          result.push_back({tile, split_k});
      }
    }
    return result;
  }();
  return plans;
}

// Measured costs of a tile: one 64-deep block of K of all its panels, everything that a tile costs
// beside its blocks (pipeline fill, epilogue), and what it costs more if 2 or 4 CTAs share it along
// K.
struct TileCost {
  TileShape tile;
  double block_us, tile_us, split_us[2];
};

// All constants come from bench/plan/fit.py and a sweep over every plan on an H100; the memory's
// bandwidth is asked of the GPU.
inline constexpr TileCost kTileCosts[] = {
    {{8, 1, 2, 4, 2}, 0.0511, 0.671, {0.353, 0.439}},   // t8_p1_k2_s4_half
    {{8, 1, 4, 4}, 0.0439, 0.679, {0.564, 0.646}},      // t8_p1_k4_s4
    {{16, 1, 2, 2, 2}, 0.0535, 0.906, {0.151, 0.247}},  // t16_p1_k2_s2_half
    {{16, 1, 4, 4}, 0.0453, 0.830, {0.334, 0.457}},     // t16_p1_k4_s4
    {{32, 1, 2, 2, 2}, 0.0614, 1.083, {0.071, 0.231}},  // t32_p1_k2_s2_half
    {{32, 1, 3, 2}, 0.0636, 0.958, {0.245, 0.483}},     // t32_p1_k3_s2
    {{32, 4, 1, 2}, 0.2221, 1.044, {0.000, 0.000}},     // t32_p4_k1_s2
    {{64, 1, 2, 2, 2}, 0.0884, 1.268, {0.204, 0.372}},  // t64_p1_k2_s2_half
    {{64, 1, 3, 2}, 0.0740, 1.274, {0.396, 0.413}},     // t64_p1_k3_s2
    {{64, 3, 1, 2}, 0.1938, 1.395, {0.999, 0.000}},     // t64_p3_k1_s2
    {{64, 4, 1, 2}, 0.2547, 1.510, {1.080, 0.000}},     // t64_p4_k1_s2
    {{96, 1, 3, 2}, 0.0865, 1.515, {0.486, 0.678}},     // t96_p1_k3_s2
    {{96, 2, 1, 2}, 0.1565, 1.753, {0.647, 0.000}},     // t96_p2_k1_s2
    {{96, 3, 1, 2}, 0.2216, 1.811, {0.933, 0.000}},     // t96_p3_k1_s2
    {{128, 1, 2, 2}, 0.1009, 1.824, {0.636, 0.804}},    // t128_p1_k2_s2
    {{128, 2, 1, 2}, 0.1688, 1.774, {0.988, 0.000}},    // t128_p2_k1_s2
    {{128, 3, 1, 2}, 0.2424, 1.919, {1.372, 0.000}},    // t128_p3_k1_s2
    {{128, 4, 1, 2}, 0.3198, 2.304, {1.625, 0.000}},    // t128_p4_k1_s2
    {{192, 2, 1, 2}, 0.2237, 2.308, {1.027, 0.000}},    // t192_p2_k1_s2
    {{192, 3, 1, 2}, 0.3327, 2.730, {1.382, 0.000}},    // t192_p3_k1_s2
    {{224, 2, 1, 2}, 0.2796, 2.551, {1.004, 0.000}},    // t224_p2_k1_s2
    {{256, 2, 1, 2}, 0.2984, 2.718, {1.026, 0.000}},    // t256_p2_k1_s2
};

// A tile that is not measured costs infinitely much, so that no plan with it is selected.
constexpr TileCost cost_of(TileShape const& tile) {
  for (TileCost const& cost : kTileCosts) {
    if (has_same_name(cost.tile, tile))
      return cost;
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return {tile, kInfinity, kInfinity, {kInfinity, kInfinity}};
}

struct CostModel {
  double launch_us = 0.6735;
  double occupancy_us = 0.9604;  // a last round that leaves SMs idle overlaps with the next launch
  double half_sm_occupancy = 0.3683;      // of that, where a CTA takes half an SM ...
  double half_sm_bytes = 160e3;           // ... and reads no more than this
  double half_sm_bytes_when_new = 140e3;  // behind a quantizer; measured, not fitted
  double half_sm_us[2] = {0.15, 0.6};     // the same, and with K split: see us_behind_quantizer
  double no_room_us = 0.8;                // the same, of whole SMs
  double memory_efficiency = 0.9127;      // of the peak
  double m_tiles_share = 0.06094;         // of tile_us, and more where tiles share their weights
  double quad_cluster_fit = 0.91;         // clusters of 4 do not tile the GPCs
  double pair_gain = 0.992;               // time of a block where pairs share tokens ...
  int many_rounds = 3;                    // ... for so many rounds: CTAs fall out of step
};

// Clusters that run at a time.
inline int most_workers(Problem const& p, Plan const& plan, CostModel const& c = {}) {
  const double fit = plan.cluster() == 4 ? c.quad_cluster_fit : 1.0;
  return plan.workers(static_cast<int>(p.num_sms * fit));
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
};

inline Division divide(int64_t m, int64_t n, int64_t k, Plan const& plan, int most_workers) {
  TileShape const& shape = plan.tile;
  // Each CTA of a pair loads half of the tokens, whole rows of the 8-row swizzle pattern.
  const int64_t unit = plan.pairs ? 16 : 1;
  const int64_t height = ceil_div(m, ceil_div(m, shape.tokens));
  Division d{};
  d.tile_tokens = static_cast<int>(ceil_div(height, unit) * unit);
  d.m_tiles = static_cast<int>(ceil_div(m, d.tile_tokens));
  d.n_tiles =
      static_cast<int>(ceil_div(ceil_div(n, kBlockRows), shape.panels * (plan.pairs ? 2 : 1)));
  d.stages = static_cast<int>(ceil_div(ceil_div(k, kBlockK), shape.stage_blocks));
  const int units = d.m_tiles * d.n_tiles;
  const int rest = units % most_workers;
  if (plan.pairs && 2 * rest <= most_workers && d.stages > 1) {
    d.whole_rounds = units / most_workers;
    d.split_tiles = 2 * rest;
    d.workers = d.whole_rounds ? most_workers : d.split_tiles;
  } else {
    d.workers = std::min(units, most_workers);
    d.whole_rounds = static_cast<int>(ceil_div(units, d.workers));
  }
  return d;
}

inline Division divide(Problem const& p, Plan const& plan, CostModel const& c = {}) {
  return divide(p.m, p.n, p.k, plan, most_workers(p, plan, c));
}

// Share of the SMs that have something to do in the last round.
inline double busy_at_the_end(Plan const& plan, Division const& d, int num_sms) {
  const double units = double(d.m_tiles) * d.n_tiles;
  const double last = d.split_tiles ? d.split_tiles : units - (d.whole_rounds - 1.0) * d.workers;
  return last * plan.cluster() / num_sms;
}

// Time of one plan, in microseconds: the larger of streaming the weights and of what the busiest SM
// has to do (softly: near the crossover the two get in each other's way), and what is fixed.
struct Estimate {
  double memory, sm, fixed;
  double total() const { return fixed + std::pow(std::pow(memory, 6) + std::pow(sm, 6), 1.0 / 6); }
};

inline Estimate estimate(Problem const& p,
                         Plan const& plan,
                         Division const& d,
                         CostModel const& c = {}) {
  TileShape const& shape = plan.tile;
  const TileCost cost = cost_of(plan.tile);
  const double panels = ceil_div(p.n, kBlockRows);
  const double k_blocks = ceil_div(p.k, kBlockK);
  const double tokens = std::min<double>(p.m, shape.tokens);

  // What the busiest SM does.
  const double rounds = d.whole_rounds + (d.split_tiles > 0);
  const double stages = d.whole_rounds * std::ceil(double(d.stages) / plan.split_k) +
                        (d.split_tiles ? std::ceil(d.stages / 2.0) : 0);
  const double block_us =
      cost.block_us * (plan.pairs && d.whole_rounds >= c.many_rounds ? c.pair_gain : 1);
  const double tile_us =
      cost.tile_us * (1 + tokens / shape.tokens) / 2 * (d.m_tiles > 1 ? 1 + c.m_tiles_share : 1);
  const double split_us = plan.split_k > 1 ? rounds * cost.split_us[plan.split_k == 4]
                          : d.split_tiles  ? cost.split_us[0]
                                           : 0;

  Estimate e;
  e.memory = panels * k_blocks * kBlockBytes / (p.memory_bytes_per_us * c.memory_efficiency);
  e.sm = stages * shape.stage_blocks * block_us + rounds * tile_us + split_us;
  // The next launch begins on SMs that the last round leaves idle: half a GPU's worth hides most.
  const double busy = busy_at_the_end(plan, d, p.num_sms);
  const double share = shape.ctas_per_sm > 1 ? c.half_sm_occupancy : 1;
  e.fixed = c.launch_us + c.occupancy_us * share * busy * busy * busy;
  return e;
}

// Tiles far too large or too small for m tokens are not measured (bench/plan/sweep.py asks here):
// the estimate says nothing of them.
inline bool is_plausible(TileShape const& shape, int64_t m) {
  const bool too_large = shape.tokens >= (m <= 16 ? 2 : 4) * std::max<int64_t>(m, 8);
  const bool too_small = m > 4 * shape.tokens && shape.tokens < 128;
  return !too_large && !too_small;
}

// What one CTA multiplies of a tile's stages, in blocks of K.
inline int64_t blocks_per_cta(Plan const& plan, int64_t stages) {
  return ceil_div(stages, plan.split_k) * plan.tile.stage_blocks;
}

// CTAs that take half an SM pay where most of what each reads fits its ring, and is fetched while
// the launch before still computes. With more to read, or several rounds, they were slower than the
// model says.
inline bool fits_half_sm(Plan const& plan,
                         Division const& d,
                         bool x_is_new,
                         CostModel const& c = {}) {
  TileShape const& shape = plan.tile;
  const int64_t bytes = blocks_per_cta(plan, d.stages) * (kBlockBytes + kBlockK * shape.tokens);
  const bool fits = bytes <= (x_is_new ? c.half_sm_bytes_when_new : c.half_sm_bytes);
  return fits && d.whole_rounds == 1 && !(x_is_new && d.m_tiles > 1);
}

// Whether a GEMM with this plan can take activations of 16 bits and quantize them itself.
inline bool fits_quantized(int64_t m, int64_t k, Plan const& plan) {
  TileShape const& shape = plan.tile;
  if (!shape.can_quantize() || m > shape.tokens || k % 8 != 0)
    return false;
  int64_t rows = 1;  // a power of two of them, to which the warps are dealt out
  while (rows < m)
    rows *= 2;
  const int64_t stage_k = shape.stage_blocks * kBlockK;
  const int64_t stages = ceil_div(k, stage_k);
  const int64_t share = blocks_per_cta(plan, stages) * kBlockK;
  return rows * stages * stage_k <= kMostQuantizedElements &&
         share / 16 * quantized_chunk_stride(m) <= most_quantized_bytes(shape.ctas_per_sm);
}

// Whether that is faster than a quantizer before it, so that `linear` is one launch; as measured.
// CTAs with many tiles have their rings full, and those of half an SM are ready, before x is: what
// it takes to read x counts less, as long as that is little.
inline bool pays_to_quantize(Problem const& p, Plan const& plan) {
  if (!fits_quantized(p.m, p.k, plan))
    return false;
  return plan.tile.ctas_per_sm > 1 ? p.m * p.k <= 16 << 10 : divide(p, plan).whole_rounds > 2;
}

// What a plan costs more where the kernel before quantizes its activations. Its CTAs, one per
// token, are ready in time if there is room for them on SMs that a GEMM leaves idle at its end.
// Where CTAs take half an SM there is room, but then none for the next GEMM's, least of all for a
// cluster of them.
inline double us_behind_quantizer(Problem const& p,
                                  Plan const& plan,
                                  Division const& d,
                                  CostModel const& c = {}) {
  if (plan.tile.ctas_per_sm > 1)
    return c.half_sm_us[plan.split_k > 1];
  constexpr int kThreadsPerSm = 2048;  // sm_90
  const int64_t threads = std::min<int64_t>(kMaxQuantizerThreads, ceil_div(p.k, kVector));
  const int64_t idle_sms = p.num_sms - std::lround(p.num_sms * busy_at_the_end(plan, d, p.num_sms));
  return p.m * threads > idle_sms * kThreadsPerSm ? c.no_room_us : 0;
}

// `x_is_new`: the kernel before quantizes its activations.
inline Plan select_plan(Problem const& p, bool x_is_new = false) {
  Plan best{};
  double best_us = 1e300;
  for (Plan const& plan : all_plans()) {
    if (!is_plausible(plan.tile, p.m) || plan.cluster() > p.num_sms)
      continue;
    const Division d = divide(p, plan);
    if (plan.split_k > d.stages)
      continue;
    // Clusters of 4 that have to take turns were always slower than the model says.
    if (plan.split_k == 4 && d.whole_rounds > 1)
      continue;
    if (plan.tile.ctas_per_sm > 1 && !fits_half_sm(plan, d, x_is_new))
      continue;
    double us = estimate(p, plan, d).total();
    if (x_is_new)
      us += us_behind_quantizer(p, plan, d);
    if (us < best_us) {
      best_us = us;
      best = plan;
    }
  }
  return best;
}

inline std::string describe(Problem const& p, Plan const& plan) {
  const Estimate e = estimate(p, plan, divide(p, plan));
  const std::string launches =
      pays_to_quantize(p, plan) ? "one launch" : "two launches, " + name(select_plan(p, true));
  char buffer[360];
  std::snprintf(buffer, sizeof buffer,
                "M=%lld N=%lld K=%lld on %d SMs, %.2f TB/s: plan %s; estimated %.1f us: "
                "memory %.1f, SMs %.1f, fixed %.1f; bound by %s; linear of 16-bit activations: %s",
                static_cast<long long>(p.m), static_cast<long long>(p.n),
                static_cast<long long>(p.k), p.num_sms, p.memory_bytes_per_us * 1e-6,
                name(plan).c_str(), e.total(), e.memory, e.sm, e.fixed,
                e.memory >= e.sm ? "memory" : "the SMs", launches.c_str());
  return buffer;
}

}  // namespace liquidgemm
