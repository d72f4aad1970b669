// Costs of INT8 weights on an H100. Not measured yet: those of the same tiles with 4-bit weights,
// which do more work per block.
#pragma once

#include "liquidgemm/plan/cost_model.hpp"

namespace liquidgemm {

inline constexpr TileCost kInt8TileCostsOfH100[] = {
    {{16, 1, 2, 2, 2}, 0.0535, 0.906, {0.151, 0.247}},  // t16_p1_k2_s2_half
    {{16, 1, 4, 4}, 0.0453, 0.830, {0.334, 0.457}},     // t16_p1_k4_s4
    {{32, 1, 3, 2}, 0.0636, 0.958, {0.245, 0.483}},     // t32_p1_k3_s2
    {{64, 3, 1, 2}, 0.1938, 1.395, {0.999, 0.000}},     // t64_p3_k1_s2
    {{128, 2, 1, 2}, 0.1688, 1.774, {0.988, 0.000}},    // t128_p2_k1_s2
    {{192, 2, 1, 2}, 0.2237, 2.308, {1.027, 0.000}},    // t192_p2_k1_s2
    {{256, 2, 1, 2}, 0.2984, 2.718, {1.026, 0.000}},    // t256_p2_k1_s2
};

inline constexpr Costs kInt8CostsOfH100 = {
    .launch_us = 0.6735,
    .occupancy_us = 0.9604,
    .half_sm_occupancy = 0.3683,
    .memory_efficiency = 0.9127,
    .m_tiles_share = 0.06094,
    .pair_gain = 0.992,
    .tiles = kInt8TileCostsOfH100,
};

}  // namespace liquidgemm
