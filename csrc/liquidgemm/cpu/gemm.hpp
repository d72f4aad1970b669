// The product of the packed weight with activations on the CPU: the whole problem, in parallel.
#pragma once

#include <cstdint>

#include "liquidgemm/cpu/kernels.hpp"

namespace liquidgemm::cpu {

// Runs body(context, begin, end) over parts of [0, count), each at least `grain` long, on the
// caller's thread pool.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

struct GemmArguments {
  void const* x;         // [m, k]
  Element x_type;        // int8, or a float type that is quantized first
  float const* x_scale;  // [m]; null if x is to be quantized
  uint8_t const* weight;
  float const* weight_scale;  // [n]
  float const* bias;          // [n] or null
  void* y;                    // [m, n]
  Element y_type;
  int64_t m, n, k;
  FormatId format = FormatId::kLiquidQuant;  // of the weight
};

void gemm(Kernels const& kernels, GemmArguments const& arguments, ParallelFor parallel_for);

struct QuantizeArguments {
  void const* x;  // [m, k]
  Element x_type;
  int8_t* out;   // [m, k]
  float* scale;  // [m]
  int64_t m, k;
};

void quantize_activation(Kernels const& kernels,
                         QuantizeArguments const& arguments,
                         ParallelFor parallel_for);

}  // namespace liquidgemm::cpu
