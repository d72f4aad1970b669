// Costs measured on an H100 with int8 weights. Written by bench/plan/fit.py: do not edit.
// Sweep: bench/results/h100-sxm/2026-11-28/plan_sweep_int8.json,
// on an NVIDIA H100 80GB HBM3, of the kernels of c02c8b8.
#pragma once

#include "liquidgemm/plan/cost_model.hpp"

namespace liquidgemm {

inline constexpr TileCost kInt8TileCostsOfH100[] = {
    {{16, 1, 2, 2, 2}, 0.1101, 0.199, {0.412, 0.000}},  // t16_p1_k2_s2_half
    {{16, 1, 4, 4}, 0.0650, 0.396, {0.798, 0.834}},     // t16_p1_k4_s4
    {{32, 1, 3, 2}, 0.0712, 0.616, {0.583, 0.613}},     // t32_p1_k3_s2
    {{64, 3, 1, 2}, 0.1601, 2.467, {0.630, 0.000}},     // t64_p3_k1_s2
    {{128, 2, 1, 2}, 0.1784, 1.952, {1.458, 0.000}},    // t128_p2_k1_s2
    {{192, 2, 1, 2}, 0.2302, 2.363, {1.486, 0.000}},    // t192_p2_k1_s2
    {{256, 2, 1, 2}, 0.3025, 3.077, {1.351, 0.000}},    // t256_p2_k1_s2
};

inline constexpr Costs kInt8CostsOfH100 = {
    .launch_us = 0.4227,
    .occupancy_us = 1.452,
    .half_sm_occupancy = 0.1493,
    .memory_efficiency = 0.8947,
    .m_tiles_share = 0,
    .pair_gain = 0.9884,
    .tiles = kInt8TileCostsOfH100,
};

}  // namespace liquidgemm
