// The LiquidQuant number format (arXiv 2509.01229, section 4), stated once for kernel, packer and
// tests.
//
//   W[n, k] ~= sigma[n] * w8,   w8 = q * s + lo,   q in 0..15,   lo = a - 128
//
// s ("step") and a ("offset") are bytes shared by a group of 64 weights along K of one output
// channel; sigma is one float per channel. a is stored biased by 128 so that q * s + a is an
// unsigned byte: multiplying and adding four such bytes inside one 32-bit word then never carries
// from one byte into the next, and flipping the top bit of each byte turns the biased byte into the
// signed one.
#pragma once

#include <cstdint>

#include <cute/config.hpp>

namespace liquidgemm {

inline constexpr int kGroupSize = 64;       // weights along K that share (s, a)
inline constexpr int kMaxCode = 15;         // largest 4-bit code
inline constexpr int kOffsetBias = 128;     // a = lo + 128
inline constexpr int kMaxActivation = 127;  // activations are clipped to [-127, 127]

// |sum over k of x8 * w8| <= K * 127 * 128 has to fit a signed 32-bit accumulator.
inline constexpr int64_t kMaxK = INT64_C(0x7fffffff) / (kMaxActivation * 128);

// Four weights at a time: one multiply-add and one xor.
//   codes    four 4-bit codes, one in the low nibble of each byte (high nibbles zero)
//   step     s, zero-extended
//   offsets  a, replicated to all four bytes
// Returns four signed 8-bit weights. Exact if and only if q * s + a <= 255 for each of the four
// codes.
CUTE_HOST_DEVICE constexpr uint32_t decode4(uint32_t codes, uint32_t step, uint32_t offsets) {
  return (codes * step + offsets) ^ 0x80808080u;
}

// One code of one group is representable.
CUTE_HOST_DEVICE constexpr bool is_feasible(int code, int step, int offset) {
  return code * step + offset <= 255;
}

}  // namespace liquidgemm
