// Costs with liquidquant_g32 weights. Those of tiles are fitted as by bench/plan/fit.py to a sweep
// on an H200, whose SMs are those of an H100, with the other constants of 6-bit codes, which are of
// an H100; splits in four, which no swept problem has in one round, cost 1.4 times those in two.
// Sweep: bench/results/h200/2026-11-28/plan_sweep_liquidquant_g32.json.
#pragma once

#include "liquidgemm/plan/cost_model.hpp"

namespace liquidgemm {

inline constexpr TileCost kLiquidQuantG32TileCostsOfH100[] = {
    {{16, 1, 4, 4}, 0.0538, 0.164, {0.558, 0.781}},   // t16_p1_k4_s4
    {{32, 1, 3, 2}, 0.0693, 0.836, {0.290, 0.406}},   // t32_p1_k3_s2
    {{64, 1, 3, 2}, 0.0767, 1.163, {0.346, 0.484}},   // t64_p1_k3_s2
    {{128, 2, 1, 2}, 0.1781, 1.741, {0.991, 0.000}},  // t128_p2_k1_s2
    {{256, 2, 1, 2}, 0.3038, 2.610, {1.127, 0.000}},  // t256_p2_k1_s2
};

inline constexpr Costs kLiquidQuantG32CostsOfH100 = {
    .launch_us = 0.3952,
    .occupancy_us = 1.641,
    .half_sm_occupancy = 0.5,
    .memory_efficiency = 0.9312,
    .m_tiles_share = 0.0000,
    .pair_gain = 0.9817,
    .tiles = kLiquidQuantG32TileCostsOfH100,
};

}  // namespace liquidgemm
