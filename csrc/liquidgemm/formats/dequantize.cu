// One CTA per block, and each thread's part of it is that of a thread of the GEMM: a fragment
// becomes eight times four neighbouring k, and the stores of a quad fill whole sectors.
#include "liquidgemm/dequantize.hpp"

#include "liquidgemm/common/launch.hpp"
#include "liquidgemm/common/math.hpp"
#include "liquidgemm/formats/formats.hpp"

namespace liquidgemm {
namespace {

constexpr int kRegisterWeights = 4;

template <class T>
struct Vector4 {
  alignas(kRegisterWeights * sizeof(T)) T values[kRegisterWeights];
};

__device__ void convert(float value, float& out) {
  out = value;
}
__device__ void convert(float value, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(value);
}
__device__ void convert(float value, __half& out) {
  out = __float2half_rn(value);
}

// Four weights of a register, at the start of the first one.
template <class T>
__device__ void store(uint32_t weights, float scale, T* out, int64_t inside, bool aligned) {
  Vector4<T> result;
#pragma unroll
  for (int i = 0; i < kRegisterWeights; ++i) {
    const auto w8 = static_cast<int8_t>(weights >> 8 * i);
    convert(__fmul_rn(static_cast<float>(w8), scale), result.values[i]);
  }
  if (aligned && inside >= kRegisterWeights) {
    *reinterpret_cast<Vector4<T>*>(out) = result;
    return;
  }
#pragma unroll
  for (int i = 0; i < kRegisterWeights; ++i) {
    if (i < inside)
      out[i] = result.values[i];
  }
}

template <class Format, class T>
__global__ void __launch_bounds__(kWarpGroupThreads) dequantize_kernel(uint8_t const* packed,
                                                                       float const* scale,
                                                                       T* out,
                                                                       int64_t n,
                                                                       int64_t k,
                                                                       int64_t k_blocks,
                                                                       bool aligned) {
  const int64_t first_row = blockIdx.x / k_blocks * kBlockRows;
  const int64_t first_k = blockIdx.x % k_blocks * kBlockK;
  // Without the assumption the fragment is read byte by byte.
  auto const* const block = static_cast<uint8_t const*>(
      __builtin_assume_aligned(packed + blockIdx.x * int64_t(Format::kBlockBytes), 16));
  BlockOperand operand;
  Format::dequantize(Format::fragment(block, threadIdx.x), operand);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int at = block_position(int(threadIdx.x), kRegisterWeights * r);
    const int64_t row = first_row + at % kBlockRows;
    if (row >= n)
      continue;
    const float sigma = scale[row];
#pragma unroll
    for (int step = 0; step < kBlockK / kMmaK; ++step) {
      const int64_t column = first_k + at / kBlockRows + step * kMmaK;
      store(operand(r, 0, step), sigma, out + row * k + column, k - column, aligned);
    }
  }
}

template <class Format, class T>
cudaError_t launch(DequantizeArguments const& a, cudaStream_t stream) {
  const int64_t k_blocks = ceil_div(a.k, kBlockK);
  const auto ctas = static_cast<unsigned>(ceil_div(a.n, kBlockRows) * k_blocks);
  const bool aligned =
      a.k % kRegisterWeights == 0 && reinterpret_cast<uintptr_t>(a.out) % sizeof(Vector4<T>) == 0;
  dequantize_kernel<Format><<<ctas, kWarpGroupThreads, 0, stream>>>(
      a.packed, a.scale, static_cast<T*>(a.out), a.n, a.k, k_blocks, aligned);
  return cudaGetLastError();
}

}  // namespace

cudaError_t dequantize(DequantizeArguments const& a, cudaStream_t stream) {
  return visit_format(a.format, [&](auto of) {
    using Format = typename decltype(of)::type;
    return launch_for(a.type,
                      [&](auto of_type) { return launch<Format, decltype(of_type)>(a, stream); });
  });
}

}  // namespace liquidgemm
