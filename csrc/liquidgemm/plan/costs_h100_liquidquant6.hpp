// Costs of an H100 with liquidquant6 weights: those of 4-bit codes, until they are measured.
#pragma once

#include "liquidgemm/plan/cost_model.hpp"

namespace liquidgemm {

inline constexpr TileCost kLiquidQuant6TileCostsOfH100[] = {
    {{16, 1, 4, 4}, 0.0540, 0.830, {0.334, 0.457}},   // t16_p1_k4_s4
    {{64, 1, 3, 2}, 0.0780, 1.274, {0.396, 0.413}},   // t64_p1_k3_s2
    {{256, 2, 1, 2}, 0.2984, 2.718, {1.026, 0.000}},  // t256_p2_k1_s2
};

inline constexpr Costs kLiquidQuant6CostsOfH100 = {
    .launch_us = 0.6735,
    .occupancy_us = 0.9604,
    .half_sm_occupancy = 0.3683,
    .memory_efficiency = 0.9127,
    .m_tiles_share = 0.06094,
    .pair_gain = 0.992,
    .tiles = kLiquidQuant6TileCostsOfH100,
};

}  // namespace liquidgemm
