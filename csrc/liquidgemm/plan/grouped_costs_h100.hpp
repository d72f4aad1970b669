// Costs measured on an H100. Written by bench/plan/fit_grouped.py: do not edit.
// Sweep: bench/results/h100-sxm/2026-11-28/moe_sweep.json,
// on an NVIDIA H100 80GB HBM3, of bbf8799.
// Sweep: bench/results/h100-sxm/2026-11-28/moe_sweep_more.json,
// on an NVIDIA H100 80GB HBM3, of 451ceff.
#pragma once

#include "liquidgemm/plan/cost_model.hpp"

namespace liquidgemm {

inline constexpr TileCost kGroupedTileCostsOfH100[] = {
    {{8, 1, 2, 4, 2}, 0.1035, 0.690, {0.141, 0}},   // t8_p1_k2_s4_half
    {{16, 1, 2, 2, 2}, 0.1224, 0.879, {0.052, 0}},  // t16_p1_k2_s2_half
    {{16, 1, 4, 4}, 0.0554, 0.657, {0.189, 0}},     // t16_p1_k4_s4
    {{32, 1, 2, 2, 2}, 0.1338, 1.010, {0.364, 0}},  // t32_p1_k2_s2_half
    {{64, 1, 3, 2}, 0.0924, 1.046, {0.580, 0}},     // t64_p1_k3_s2
    {{64, 3, 1, 2}, 0.2483, 1.025, {0.000, 0}},     // t64_p3_k1_s2
    {{128, 3, 1, 2}, 0.3050, 1.423, {0.000, 0}},    // t128_p3_k1_s2
    {{192, 2, 1, 2}, 0.2917, 1.220, {0.000, 0}},    // t192_p2_k1_s2
    {{256, 2, 1, 2}, 0.3470, 1.207, {0.000, 0}},    // t256_p2_k1_s2
};

inline constexpr GroupedCosts kGroupedCostsOfH100 = {
    .launch_us = 4.358,
    .memory_efficiency = 0.9007,
    .tiles = kGroupedTileCostsOfH100,
};

}  // namespace liquidgemm
