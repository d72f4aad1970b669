// What a plan is chosen for.
#pragma once

#include <cstdint>

#include "liquidgemm/formats/format_id.hpp"

namespace liquidgemm {

struct Problem {
  int64_t m, n, k;                           // y [m, n] = x [m, k] times W [n, k] transposed
  int num_sms;                               // at most so many are used
  double memory_bytes_per_us;                // peak of the GPU
  FormatId format = FormatId::kLiquidQuant;  // of W

  friend bool operator==(Problem const&, Problem const&) = default;
};

// How the GEMM gets its int8 activations.
enum class Activations {
  kReady,             // an earlier kernel wrote them
  kJustQuantized,     // a quantizer or another producer writes them in the launch right before
  kQuantizeInKernel,  // the kernel reads 16-bit activations and quantizes them itself
};

}  // namespace liquidgemm
