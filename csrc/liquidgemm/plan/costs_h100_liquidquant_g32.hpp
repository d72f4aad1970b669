// Costs of an H100 with liquidquant_g32 weights: those of groups of 64, until they are measured.
#pragma once

#include "liquidgemm/plan/cost_model.hpp"

namespace liquidgemm {

inline constexpr TileCost kLiquidQuantG32TileCostsOfH100[] = {
    {{16, 1, 4, 4}, 0.0453, 0.830, {0.334, 0.457}},   // t16_p1_k4_s4
    {{32, 1, 3, 2}, 0.0636, 0.958, {0.245, 0.483}},   // t32_p1_k3_s2
    {{64, 1, 3, 2}, 0.0740, 1.274, {0.396, 0.413}},   // t64_p1_k3_s2
    {{128, 2, 1, 2}, 0.1688, 1.774, {0.988, 0.000}},  // t128_p2_k1_s2
    {{256, 2, 1, 2}, 0.2984, 2.718, {1.026, 0.000}},  // t256_p2_k1_s2
};

inline constexpr Costs kLiquidQuantG32CostsOfH100 = {
    .launch_us = 0.6735,
    .occupancy_us = 0.9604,
    .half_sm_occupancy = 0.3683,
    .memory_efficiency = 0.9127,
    .m_tiles_share = 0.06094,
    .pair_gain = 0.992,
    .tiles = kLiquidQuantG32TileCostsOfH100,
};

}  // namespace liquidgemm
