// Integer arithmetic of the GEMM: int8 activations times int8 weights, summed in int32.
#pragma once

#include <cstdint>

namespace liquidgemm {

inline constexpr int kMaxActivation = 127;  // activations are clipped to [-127, 127]

// |sum over k of x8 * w8| <= K * 127 * 128 has to fit a signed 32-bit accumulator.
inline constexpr int64_t kMaxK = INT64_C(0x7fffffff) / (kMaxActivation * 128);

}  // namespace liquidgemm
