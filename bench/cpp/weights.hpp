// Random packed weights, and their product by the plainest of kernels.
#pragma once

#include "harness.hpp"
#include "liquidgemm/formats/liquidquant.hpp"

namespace bench {

using liquidgemm::kBlockK;
using liquidgemm::kBlockRows;
using liquidgemm::LiquidQuant;

// Every block gets random codes and feasible steps and offsets; one CTA of kBlockRows threads per
// block.
__global__ void fill_weights_kernel(uint8_t* packed, int64_t first_block) {
  const int64_t index = first_block + blockIdx.x;
  uint8_t* const block = packed + index * LiquidQuant::kBlockBytes;
  auto* const words = reinterpret_cast<uint32_t*>(block);
  for (int i = threadIdx.x; i < LiquidQuant::kCodeBytes / 4; i += blockDim.x)
    words[i] = random_word(index * LiquidQuant::kBlockBytes + i);
  const uint32_t random = random_word(~(index * kBlockRows + threadIdx.x));
  const int step = 1 + random % 16;
  const int offset = (random >> 8) % (256 - LiquidQuant::kMaxCode * step);
  block[LiquidQuant::param_position(threadIdx.x)] = static_cast<uint8_t>(step);
  block[LiquidQuant::param_position(threadIdx.x) + 1] = static_cast<uint8_t>(offset);
}

inline void fill_weights(uint8_t* packed, int64_t bytes, cudaStream_t stream) {
  const int64_t blocks = bytes / LiquidQuant::kBlockBytes;
  constexpr int64_t kPerLaunch = 1 << 24;
  for (int64_t first = 0; first < blocks; first += kPerLaunch) {
    fill_weights_kernel<<<static_cast<int>(std::min(kPerLaunch, blocks - first)), kBlockRows, 0,
                          stream>>>(packed, first);
    check(cudaGetLastError(), "random weights");
  }
}

// Activations in -127..127.
__global__ void fill_tokens_kernel(int8_t* tokens, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x)
    tokens[i] = static_cast<int8_t>(int(random_word(i ^ 0x5bd1e995) % 255) - 127);
}

// sums[m, n] = sum over k of x[m, k] * w[n, k], one thread each; k a multiple of kBlockK.
__global__ void reference_kernel(
    uint8_t const* packed, int8_t const* x, int n, int k, int32_t* sums) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  const int token = blockIdx.y;
  if (channel >= n)
    return;
  const int row = channel % kBlockRows;
  uint8_t const* block =
      packed + int64_t(channel / kBlockRows) * (k / kBlockK) * LiquidQuant::kBlockBytes;
  int32_t sum = 0;
  for (int i = 0; i < k; ++i) {
    if (i > 0 && i % kBlockK == 0)
      block += LiquidQuant::kBlockBytes;
    const auto at = LiquidQuant::code_position(row, i % kBlockK);
    const int code = block[at.byte] >> at.shift & LiquidQuant::kMaxCode;
    const int step = block[LiquidQuant::param_position(row)];
    const int offset = block[LiquidQuant::param_position(row) + 1];
    sum += (code * step + offset - LiquidQuant::kOffsetBias) * x[int64_t(token) * k + i];
  }
  sums[int64_t(token) * n + channel] = sum;
}

inline void reference(uint8_t const* packed,
                      int8_t const* x,
                      int m,
                      int n,
                      int k,
                      int32_t* sums,
                      cudaStream_t stream) {
  reference_kernel<<<dim3((n + 127) / 128, m), 128, 0, stream>>>(packed, x, n, k, sums);
  check(cudaGetLastError(), "reference");
}

}  // namespace bench
