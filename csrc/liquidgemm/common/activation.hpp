// Activation functions of MLPs in fp32: the same bits on host and device, but for payloads of NaNs,
// since each is a fixed sequence of separately rounded operations, none of them approximate. A
// shorter way for gates of 16 bits, with the same bits, is in kernel/store/gated_pair.hpp.
//
// Errors against float64, over every bfloat16 and a million other floats, are at most 1 ulp of exp,
// 2 of silu, and 2.5 (1 + |e|) of gelu_tanh and swiglu_gate, where e is the exponential's argument
// (tests/cpp/test_activation.cpp). exp is gradual down to the smallest denormal and then 0, and
// infinity above the largest number; where exp(-x) is infinity, as it is in torch, the others are
// -0 instead of numbers below 2^-121. A NaN gives a NaN, and so does -infinity, as in torch.
#pragma once

#include <cstdint>

#include "liquidgemm/common/gated_activation.hpp"
#include "liquidgemm/common/rounded.hpp"

namespace liquidgemm {
namespace {

// exp(x) = 2^n * exp(r) with n = rint(x / ln 2) and |r| <= ln 2 / 2.
struct ReducedExp {
  float of_rest;  // exp(r), in 0.7 to 1.42
  float shifted;  // n + kShift, whose low bits are those of n
  static constexpr float kShift = 0x1.8p23f;
};

// |x| up to 110. `kOffset` is added to n.
template <int kOffset = 0>
CUTE_HOST_DEVICE ReducedExp reduced_exp(float x) {
  using namespace rounded;
  constexpr float kLog2E = 0x1.715476p0f;
  // ln 2 = high + low; products of n and high are exact.
  constexpr float kLn2High = 355.f / 512.f, kLn2Low = -0x1.bd0106p-13f;
  constexpr float kShift = ReducedExp::kShift + float(kOffset);
  const float shifted = add(multiply(x, kLog2E), kShift);
  const float minus_n = add(kShift, -shifted);
  const float r = add(add_exact_product(minus_n, kLn2High, x), multiply(minus_n, kLn2Low));
  // (exp(r) - 1 - r) / r^2, minimax: 2^-28 relative to exp(r).
  float tail = 0x1.6a504cp-10f;
  tail = add(multiply(tail, r), 0x1.123976p-7f);
  tail = add(multiply(tail, r), 0x1.5558acp-5f);
  tail = add(multiply(tail, r), 0x1.555492p-3f);
  tail = add(multiply(tail, r), 0x1.fffffcp-2f);
  return {add(add(multiply(multiply(r, r), tail), r), 1.f), shifted};
}

CUTE_HOST_DEVICE float exp(float x) {
  // Where it is 0 and infinity already. Written so that a NaN remains one.
  x = x < -104.f ? -104.f : x;
  x = x > 89.f ? 89.f : x;
  const ReducedExp reduced = reduced_exp(x);
  // 2^n in two factors: n may be less or more than the exponent of a normal number. The first
  // product is exact.
  const uint32_t bits = rounded::float_bits(reduced.shifted);
  const int32_t n = static_cast<int32_t>(bits - rounded::float_bits(ReducedExp::kShift));
  const int32_t half = n >> 1;
  const float first = rounded::float_from(static_cast<uint32_t>(half + 127) << 23);
  const float second = rounded::float_from(static_cast<uint32_t>(n - half + 127) << 23);
  return rounded::multiply(rounded::multiply(reduced.of_rest, first), second);
}

// 1 + exp(x), to the bit, in fewer operations; of a NaN it is 1.
CUTE_HOST_DEVICE float one_plus_exp(float x) {
  // exp(-32) changes nothing. Of the forms of max and min, those that are one instruction.
#ifdef __CUDA_ARCH__
  x = fminf(fmaxf(x, -32.f), 89.f);
#else
  x = x > -32.f ? x : -32.f;
  x = x < 89.f ? x : 89.f;
#endif
  // n - 1 goes to the exponent, which has room for it, and the last factor into the sum.
  const ReducedExp reduced = reduced_exp<-1>(x);
  const float half = rounded::float_from(rounded::float_bits(reduced.of_rest) +
                                         (rounded::float_bits(reduced.shifted) << 23));
  return rounded::add_exact_product(half, 2.f, 1.f);
}

// x * sigmoid(x), as x / (1 + exp(-x)).
CUTE_HOST_DEVICE float silu(float x) {
  return rounded::divide(x, one_plus_exp(-x));
}

// x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), as x / (1 + exp(-2 u)).
CUTE_HOST_DEVICE float gelu_exponent(float x) {  // -2 u
  using namespace rounded;
  constexpr float kMinusTwoRoot = -0x1.988454p0f;  // -2 sqrt(2 / pi)
  const float cubic = multiply(0.044715f, multiply(multiply(x, x), x));
  return multiply(kMinusTwoRoot, add(x, cubic));
}
CUTE_HOST_DEVICE float gelu_tanh(float x) {
  return rounded::divide(x, one_plus_exp(gelu_exponent(x)));
}

// The two factors of a clamped SwiGLU: min(x, 7) * sigmoid(1.702 min(x, 7)), and
// min(max(x, -7), 7) + 1. A NaN remains one.
inline constexpr float kSwigluLimit = 7.f, kSwigluAlpha = 1.702f;

CUTE_HOST_DEVICE float swiglu_gate(float x) {
  x = x > kSwigluLimit ? kSwigluLimit : x;
  return rounded::divide(x, one_plus_exp(rounded::multiply(-kSwigluAlpha, x)));
}
CUTE_HOST_DEVICE float swiglu_up(float x) {
  x = x > kSwigluLimit ? kSwigluLimit : x;
  x = x < -kSwigluLimit ? -kSwigluLimit : x;
  return rounded::add(x, 1.f);
}

}  // namespace

namespace {

// R(R(silu(gate)) * up), R(R(gelu_tanh(gate)) * up) or R(R(swiglu_gate(gate)) * R(swiglu_up(up))):
// gate and up are of a dtype already, and `round` rounds to that dtype and back to float.
template <GatedActivation kActivation, class Round>
CUTE_HOST_DEVICE float gated(float gate, float up, Round round) {
  if constexpr (kActivation == GatedActivation::kSiluMul) {
    return round(rounded::multiply(round(silu(gate)), up));
  } else if constexpr (kActivation == GatedActivation::kGeluTanhMul) {
    return round(rounded::multiply(round(gelu_tanh(gate)), up));
  } else {
    return round(rounded::multiply(round(swiglu_gate(gate)), round(swiglu_up(up))));
  }
}

}  // namespace
}  // namespace liquidgemm
