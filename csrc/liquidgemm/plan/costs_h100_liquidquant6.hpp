// Costs measured on an H100 with liquidquant6 weights. Written by bench/plan/fit.py, but for those
// of splits in four, which no swept problem has in one round: 1.4 times those of splits in two, as
// of INT8 weights. Sweep: bench/results/h100-sxm/2026-11-28/plan_sweep_liquidquant6.json, on an
// NVIDIA H100 80GB HBM3, of the kernels of 5fad2d4. The tiles of 32 and 128 tokens came later; with
// all other constants given, they are fitted to
// bench/results/h200/2026-11-28/plan_sweep_liquidquant6.json, on an H200, whose SMs are the same.
#pragma once

#include "liquidgemm/plan/cost_model.hpp"

namespace liquidgemm {

inline constexpr TileCost kLiquidQuant6TileCostsOfH100[] = {
    {{16, 1, 4, 4}, 0.0572, 0.706, {0.343, 0.480}},   // t16_p1_k4_s4
    {{32, 1, 3, 2}, 0.0707, 0.942, {0.449, 0.628}},   // t32_p1_k3_s2
    {{64, 1, 3, 2}, 0.0807, 1.238, {0.644, 0.902}},   // t64_p1_k3_s2
    {{128, 2, 1, 2}, 0.1930, 1.743, {1.365, 0.000}},  // t128_p2_k1_s2
    {{256, 2, 1, 2}, 0.3085, 3.131, {0.831, 0.000}},  // t256_p2_k1_s2
};

inline constexpr Costs kLiquidQuant6CostsOfH100 = {
    .launch_us = 0.3952,
    .occupancy_us = 1.641,
    .half_sm_occupancy = 0.5,
    .memory_efficiency = 0.9312,
    .m_tiles_share = 0.0000,
    .pair_gain = 0.9857,
    .tiles = kLiquidQuant6TileCostsOfH100,
};

}  // namespace liquidgemm
