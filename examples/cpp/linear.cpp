// A linear layer through the C++ API: packs a weight, plans, runs, and checks the result on the
// host. Prints the plan even without a GPU; returns 0 if the result is right, 2 without a Hopper
// GPU.
#include "liquidgemm/linear.hpp"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "liquidgemm/device.hpp"
#include "liquidgemm/pack.hpp"

namespace {

constexpr int64_t kTokens = 64, kChannels = 1024, kInputs = 2048, kGroup = 64;

void check(cudaError_t error, char const* what) {
  if (error == cudaSuccess)
    return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// A copy of host data on the GPU, or uninitialized memory. The program is short: none is freed.
template <class T>
T* on_gpu(std::vector<T> const& host) {
  void* device = nullptr;
  check(cudaMalloc(&device, host.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  return static_cast<T*>(device);
}
template <class T>
T* on_gpu(int64_t count) {
  void* device = nullptr;
  check(cudaMalloc(&device, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(device);
}

}  // namespace

int main() {
  using namespace liquidgemm;

  // Without a GPU: the plan that an H100 would run.
  DeviceInfo device{.num_sms = 132, .compute_capability = 0, .memory_bytes_per_us = 3.35e6};
  const bool is_hopper = query_device(device) == cudaSuccess && device.compute_capability == 90;
  if (!is_hopper)
    device = {.num_sms = 132, .compute_capability = 0, .memory_bytes_per_us = 3.35e6};
  const Problem problem{.m = kTokens,
                        .n = kChannels,
                        .k = kInputs,
                        .num_sms = device.num_sms,
                        .memory_bytes_per_us = device.memory_bytes_per_us};
  const LaunchPlan plan = plan_linear(problem, /*x_is_readable=*/false);
  std::printf("%s\n", to_string(plan).c_str());
  std::printf("workspace: %lld bytes\n", static_cast<long long>(linear_workspace_bytes(plan)));
  if (!is_hopper) {
    std::printf("no Hopper GPU: nothing was run\n");
    return 2;
  }

  // A weight in the logical layout: code q of column k is (n + k) % 16, every w8 = q * 2 - 16.
  std::vector<uint8_t> codes(kChannels * kInputs / 2);
  for (int64_t n = 0; n < kChannels; ++n) {
    for (int64_t k = 0; k < kInputs; k += 2)
      codes[(n * kInputs + k) / 2] = static_cast<uint8_t>((n + k) % 16 | (n + k + 1) % 16 << 4);
  }
  const int64_t groups = kInputs / kGroup;
  const LogicalWeight logical{.qweight = on_gpu(codes),
                              .qscale = on_gpu(std::vector<uint8_t>(kChannels * groups, 2)),
                              .qoffset = on_gpu(std::vector<uint8_t>(kChannels * groups, 128 - 16)),
                              .n = kChannels,
                              .k_blocks = groups};
  uint8_t* const weight = on_gpu<uint8_t>(packed_bytes(kChannels, groups));
  int* const infeasible = on_gpu(std::vector<int>(1, 0));
  check(pack_weight(logical, weight, infeasible, nullptr), "pack_weight");

  // Token m holds 127 in column m and zeros elsewhere: its scale is 1, its sums are 127 * w8[n, m].
  std::vector<float> x(kTokens * kInputs);
  for (int64_t m = 0; m < kTokens; ++m)
    x[m * kInputs + m] = 127;
  std::vector<float> y(kTokens * kChannels);
  float* const result = on_gpu<float>(kTokens * kChannels);
  check(linear({.x = on_gpu(x),
                .x_type = Element::kFloat32,
                .weight = weight,
                .weight_scale = on_gpu(std::vector<float>(kChannels, 0.5f)),
                .bias = nullptr,
                .bias_type = Element::kFloat32,
                .y = result,
                .y_type = Element::kFloat32,
                .y_stride = kChannels},
               plan, on_gpu<uint8_t>(linear_workspace_bytes(plan)), nullptr),
        "linear");
  check(cudaMemcpy(y.data(), result, y.size() * sizeof(float), cudaMemcpyDeviceToHost), "y");

  for (int64_t m = 0; m < kTokens; ++m) {
    for (int64_t n = 0; n < kChannels; ++n) {
      const float expected = 127 * static_cast<float>((n + m) % 16 * 2 - 16) * 0.5f;
      if (y[m * kChannels + n] != expected) {
        std::printf("token %lld, channel %lld: expected %g, got %g\n", static_cast<long long>(m),
                    static_cast<long long>(n), expected, y[m * kChannels + n]);
        return 1;
      }
    }
  }
  std::printf("all %lld results are exact\n", static_cast<long long>(kTokens * kChannels));
  return 0;
}
