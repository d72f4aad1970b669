// The activation functions against float64, over every bfloat16 and many other floats.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "liquidgemm/common/activation.hpp"

using namespace liquidgemm;
using rounded::float_bits, rounded::float_from;

namespace {

int failures = 0;

void expect(bool condition, char const* what, float x, double got, double expected) {
  if (!condition && ++failures <= 20)
    std::printf("FAILED: %s of %a: got %a, expected %a\n", what, x, got, expected);
}

// In units of the last place of a float that is about `exact`.
double ulps(float got, double exact) {
  const int exponent = std::max(std::ilogb(exact), -126);
  return std::fabs(got - exact) / std::ldexp(1., exponent - 23);
}

bool overflows(double exact) {
  return std::fabs(exact) > std::numeric_limits<float>::max();
}

// Every bfloat16, and every float whose bits are a multiple of a prime.
template <class Check>
void for_all(Check check) {
  for (uint32_t high = 0; high < 0x10000u; ++high)
    check(float_from(high << 16));
  for (uint64_t bits = 0; bits <= UINT32_MAX; bits += 4093)
    check(float_from(static_cast<uint32_t>(bits)));
}

// Results up to `vanishes` may be zero. `exponent(x)` is the argument of an exponential: its own
// rounding becomes as many ulps of the result as it is large.
template <class Function, class Exact, class Exponent>
void test(char const* name,
          Function function,
          Exact exact,
          Exponent exponent,
          double bound,
          double vanishes) {
  double largest = 0;
  float where = 0;
  for_all([&](float x) {
    const float got = function(x);
    const double expected = exact(double(x));
    if (std::isnan(expected)) {
      expect(std::isnan(got), name, x, got, expected);
    } else if (overflows(expected)) {
      expect(std::isinf(got) && (got > 0) == (expected > 0), name, x, got, expected);
    } else if (got == 0) {
      const bool expected_sign = expected == 0 || std::signbit(expected) == std::signbit(got);
      expect(std::fabs(expected) <= vanishes && expected_sign, name, x, got, expected);
    } else if (expected == 0) {
      expect(false, name, x, got, expected);
    } else {
      const double error = ulps(got, expected) / (1 + std::fabs(exponent(x)));
      if (error > largest)
        largest = error, where = x;
      expect(error <= bound, name, x, got, expected);
    }
  });
  std::printf("%s: at most %.3f ulp, at %a\n", name, largest, where);
}

}  // namespace

int main() {
  const auto exact = [](double) { return 0.; };
  test("exp", liquidgemm::exp, [](double x) { return std::exp(x); }, exact, 1, 0x1p-150);
  test("silu", silu, [](double x) { return x / (1 + std::exp(-x)); }, exact, 2, 0x1p-121);
  const auto twice_u = [](double x) {
    return 2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  };
  const auto gelu = [&](double x) { return x / (1 + std::exp(-twice_u(x))); };
  test("gelu_tanh", gelu_tanh, gelu, twice_u, 2.5, 0x1p-121);
  const auto clamped = [](double x) { return x > 7 ? 7 : x; };
  const auto alpha_x = [&](double x) { return double(kSwigluAlpha) * clamped(x); };
  const auto gate = [&](double x) { return clamped(x) / (1 + std::exp(-alpha_x(x))); };
  test("swiglu_gate", swiglu_gate, gate, alpha_x, 2, 0x1p-121);
  for_all([](float x) {
    const float expected = rounded::add(1.f, liquidgemm::exp(x));
    const float got = one_plus_exp(x);
    expect(std::isnan(x) ? got == 1 : float_bits(got) == float_bits(expected), "1 + exp", x, got,
           expected);
    const float up = swiglu_up(x);
    const float clamped = x > 7 ? 7 : x < -7 ? -7 : x;
    expect(std::isnan(x) ? std::isnan(up) : up == clamped + 1.f, "swiglu_up", x, up, clamped + 1.);
  });
  std::printf("activation: %d wrong\n", failures);
  return failures != 0;
}
