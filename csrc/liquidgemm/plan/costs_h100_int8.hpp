// Costs measured on an H100 with int8 weights. Written by bench/plan/fit.py: do not edit.
// Sweep: bench/results/h100-sxm/2026-11-28/plan_sweep_int8.json,
// on an NVIDIA H100 80GB HBM3, of the kernels of c02c8b8.
#pragma once

#include "liquidgemm/plan/cost_model.hpp"

namespace liquidgemm {

inline constexpr TileCost kInt8TileCostsOfH100[] = {
    {{16, 1, 2, 2, 2}, 0.0684, 0.662, {0.354, 0.600}},  // t16_p1_k2_s2_half
    {{16, 1, 4, 4}, 0.0540, 0.542, {0.560, 0.823}},     // t16_p1_k4_s4
    {{32, 1, 3, 2}, 0.0628, 0.676, {0.476, 0.665}},     // t32_p1_k3_s2
    {{64, 3, 1, 2}, 0.1771, 1.582, {0.791, 0.000}},     // t64_p3_k1_s2
    {{128, 2, 1, 2}, 0.1812, 1.594, {1.236, 0.000}},    // t128_p2_k1_s2
    {{192, 2, 1, 2}, 0.2315, 2.213, {1.173, 0.000}},    // t192_p2_k1_s2
    {{256, 2, 1, 2}, 0.3006, 3.007, {1.240, 0.000}},    // t256_p2_k1_s2
};

inline constexpr Costs kInt8CostsOfH100 = {
    .launch_us = 0.6772,
    .occupancy_us = 1.512,
    .half_sm_occupancy = 0.292,
    .memory_efficiency = 0.8865,
    .m_tiles_share = 0.0039,
    .pair_gain = 0.9927,
    .tiles = kInt8TileCostsOfH100,
};

}  // namespace liquidgemm
