// What the C++ API refuses, before anything is launched: this needs no GPU.
#include <cstdint>
#include <cstdio>

#include "liquidgemm/gemm.hpp"
#include "liquidgemm/linear.hpp"
#include "liquidgemm/pack.hpp"
#include "liquidgemm/quantize.hpp"

using namespace liquidgemm;

namespace {

int failures = 0;

void expect(bool condition, char const* what) {
  if (condition)
    return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

alignas(16) uint8_t memory[64];

LinearArguments linear_arguments(Element x_type, void const* x = memory) {
  LinearArguments a{};
  a.x = x;
  a.x_type = x_type;
  a.weight = memory;
  a.y = memory;
  a.y_type = Element::kBFloat16;
  a.y_stride = 64;
  return a;
}

GemmArguments gemm_arguments(Element x_type) {
  GemmArguments a{};
  a.x = memory;
  a.x_type = x_type;
  a.x_stride = 64;
  a.weight = memory;
  a.y = memory;
  a.y_type = Element::kBFloat16;
  a.y_stride = 64;
  return a;
}

}  // namespace

int main() {
  const Problem one{1, 4096, 4096, 132, 3.35e6}, many{64, 4096, 4096, 132, 3.35e6};
  const LaunchPlan product = plan_gemm(one);
  const LaunchPlan in_one = plan_linear(one, true);
  const LaunchPlan in_two = plan_linear(many, true);
  expect(in_one.launches() == 1 && in_two.launches() == 2, "one launch, and two");
  expect(linear_workspace_bytes(in_one) == 0, "one launch needs no workspace");
  expect(linear_workspace_bytes(in_two) == 64 * (4096 + 4), "int8 rows and their scales");
  expect(linear_workspace_bytes(plan_linear({64, 64, 100, 132, 3.35e6}, true)) == 64 * (112 + 4),
         "rows are padded to 16 bytes");
  expect(packed_bytes(65, 3) == 2 * 3 * 2176, "whole panels of 64 channels");

  expect(kernel_can_read(Element::kFloat16, memory), "16 bits, aligned");
  expect(!kernel_can_read(Element::kFloat32, memory), "32 bits");
  expect(!kernel_can_read(Element::kBFloat16, memory + 8), "half aligned");

  const auto refused = [](cudaError_t error) { return error == cudaErrorInvalidValue; };
  expect(refused(linear(linear_arguments(Element::kBFloat16), product, memory, nullptr)),
         "linear() with a plan for gemm()");
  expect(refused(linear(linear_arguments(Element::kFloat32), in_one, nullptr, nullptr)),
         "one launch with 32-bit activations");
  expect(
      refused(linear(linear_arguments(Element::kBFloat16, memory + 8), in_one, nullptr, nullptr)),
      "one launch with unaligned activations");
  expect(refused(linear(linear_arguments(Element::kInt8), in_two, memory, nullptr)),
         "quantizing int8");
  expect(refused(gemm(gemm_arguments(Element::kBFloat16), product, nullptr)),
         "gemm() of 16-bit activations with a plan for int8");
  expect(refused(gemm(gemm_arguments(Element::kInt8), in_one, nullptr)),
         "gemm() of int8 with a plan that quantizes");
  LaunchPlan forged = in_one;
  forged.problem.m = 9;
  expect(refused(gemm(gemm_arguments(Element::kBFloat16), forged, nullptr)),
         "more tokens than a kernel can quantize");
  forged = product;
  forged.plan.tile.panels = 5;
  expect(refused(gemm(gemm_arguments(Element::kInt8), forged, nullptr)), "a tile without a kernel");

  std::printf("%s\n", failures ? "contracts: FAILED" : "contracts: ok");
  return failures != 0;
}
