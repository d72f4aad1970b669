// Scales and zero points as the lanes of a warp need them.
#pragma once

#include <cstdint>

#include <cute/config.hpp>

namespace liquidgemm::attention {

// Scales of a lane's four tokens, which are 2g, 2g + 1, 16 + 2g and 16 + 2g + 1 of the block.
template <class Shape>
struct TokenParams {
  float scale[4];
  int zero[4];  // of int4

  CUTE_DEVICE explicit TokenParams(uint8_t const* params) {
    const int g = threadIdx.x % 32 / 4;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint8_t const* const pair = params + (8 * half + g) * Shape::kPairBytes;
      if constexpr (Shape::kInt4) {
        const uint2 words = *reinterpret_cast<uint2 const*>(pair);
        set(2 * half, words.x);
        set(2 * half + 1, words.y);
      } else {
        const uint32_t word = *reinterpret_cast<uint32_t const*>(pair);
        scale[2 * half] = __uint_as_float(word << 16);
        scale[2 * half + 1] = __uint_as_float(word & 0xffff0000u);
      }
    }
  }

 private:
  CUTE_DEVICE void set(int i, uint32_t word) {
    scale[i] = __uint_as_float(word & 0xffff0000u);
    zero[i] = static_cast<int>(word & 15);
  }
};

}  // namespace liquidgemm::attention
