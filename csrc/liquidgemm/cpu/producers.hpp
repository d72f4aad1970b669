// Norm and gated activation of many rows, quantized, in parallel.
#pragma once

#include <cstdint>

#include "liquidgemm/cpu/gemm.hpp"

namespace liquidgemm::cpu {

// The arguments of one row are those of the first; pointers advance by a row.
struct RmsNormArguments {
  RmsNormRow row;  // y may be null
  int8_t* out;     // [m, k]
  float* scale;    // [m]
  int64_t m;
};

struct GluArguments {
  GluRow row;  // y may be null
  int8_t* out;
  float* scale;
  int64_t m;
};

void rms_norm_quantize(Kernels const& kernels,
                       RmsNormArguments const& arguments,
                       ParallelFor parallel_for);
void glu_quantize(Kernels const& kernels, GluArguments const& arguments, ParallelFor parallel_for);

}  // namespace liquidgemm::cpu
