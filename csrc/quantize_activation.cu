// Activation quantization: one CTA per token.
//
//   scale[m] = max_k |x[m, k]| / 127,  out[m, k] = clamp(rint(x[m, k] / scale[m]), -127, 127)
//
// in fp32 with IEEE division and ties to even. A row with a NaN or an infinity gets scale NaN and
// zeros, so that its outputs, and no others, are NaN; a row of zeros gets scale 0. The row is read
// once and held in registers, up to kHeldVectors per thread; what is longer is read again, from L1
// or L2.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/arch/grid_dependency_control.h>

#include <algorithm>

#include "liquidgemm/gemm.hpp"

namespace liquidgemm {
namespace {

constexpr int kVector = 8;  // elements a thread loads, converts and stores at once
constexpr int kHeldVectors = 4;
constexpr uint32_t kInfinityBits = 0x7f800000u;

__device__ float to_float(float v) {
  return v;
}
__device__ float to_float(__half v) {
  return __half2float(v);
}
__device__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

template <class T>
struct Vector {
  T values[kVector];

  // Elements past `count` are zeros: they change neither the maximum nor anything that is stored.
  __device__ void load(T const* source, int64_t count, bool aligned) {
    if (aligned && count >= kVector) {
      constexpr int kLoads = sizeof(values) / sizeof(uint4);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<uint4 const*>(source)[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        values[i] = i < count ? source[i] : T(0.f);
    }
  }

  // |v| as an integer orders like |v| as a float, with infinity and then NaN above every number.
  __device__ uint32_t max_abs_bits() const {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      largest = max(largest, __float_as_uint(to_float(values[i])) & 0x7fffffffu);
    return largest;
  }

  __device__ void store_quantized(int8_t* out, float scale, int64_t count, bool aligned) const {
    alignas(8) int8_t bytes[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int rounded = __float2int_rn(__fdiv_rn(to_float(values[i]), scale));
      bytes[i] = scale > 0.f
                     ? static_cast<int8_t>(max(-kMaxActivation, min(kMaxActivation, rounded)))
                     : int8_t(0);
    }
    if (aligned && count >= kVector) {
      *reinterpret_cast<uint2*>(out) = *reinterpret_cast<uint2 const*>(bytes);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < count)
          out[i] = bytes[i];
      }
    }
  }
};

__device__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[32];
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0)
    of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = blockDim.x / 32;
  return __reduce_max_sync(0xffffffffu, threadIdx.x % 32 < warps ? of_warp[threadIdx.x % 32] : 0u);
}

template <class T>
__global__ void quantize_kernel(
    T const* x, int8_t* out, float* scales, int64_t k, int64_t out_stride, bool aligned) {
  // The next kernel, a GEMM, may start to fetch its weights. It waits for this one before it
  // touches anything else, and this one for the kernel before it.
  cutlass::arch::launch_dependent_grids();
  cutlass::arch::wait_on_dependent_grids();

  T const* const row = x + blockIdx.x * k;
  int8_t* const out_row = out + blockIdx.x * out_stride;
  const int64_t first = int64_t(threadIdx.x) * kVector;
  const int64_t step = int64_t(blockDim.x) * kVector;

  Vector<T> held[kHeldVectors];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i)
    held[i].load(row + first + i * step, k - first - i * step, aligned);
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i)
    largest = max(largest, held[i].max_abs_bits());
  for (int64_t at = first + kHeldVectors * step; at < k; at += step) {
    Vector<T> more;
    more.load(row + at, k - at, aligned);
    largest = max(largest, more.max_abs_bits());
  }
  largest = block_max(largest);

  const bool finite = largest < kInfinityBits;
  const float scale = finite ? __fdiv_rn(__uint_as_float(largest), float(kMaxActivation))
                             : __uint_as_float(0x7fc00000u);
  if (threadIdx.x == 0)
    scales[blockIdx.x] = scale;
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i) {
    held[i].store_quantized(out_row + first + i * step, scale, k - first - i * step, aligned);
  }
  for (int64_t at = first + kHeldVectors * step; at < k; at += step) {
    Vector<T> more;
    more.load(row + at, k - at, aligned);
    more.store_quantized(out_row + at, scale, k - at, aligned);
  }
}

template <class T>
cudaError_t launch(QuantizeArguments const& a, cudaStream_t stream) {
  // Few tokens: as many threads as the row has vectors, for latency. Many: fewer threads with more
  // each, for throughput.
  const int64_t vectors = ceil_div(a.k, kVector);
  const int64_t threads = ceil_div(vectors, a.m >= 512 ? kHeldVectors : 1);
  const bool aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && a.k * sizeof(T) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(a.out) % kVector == 0 &&
                       a.out_stride % kVector == 0;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(a.m));
  config.blockDim =
      dim3(static_cast<unsigned>(std::min<int64_t>(1024, ceil_div(threads, 32) * 32)));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, quantize_kernel<T>, static_cast<T const*>(a.x), a.out, a.scale,
                            a.k, a.out_stride, aligned);
}

}  // namespace

cudaError_t quantize_activation(QuantizeArguments const& a, cudaStream_t stream) {
  if (a.m == 0)
    return cudaSuccess;
  switch (a.x_type) {
    case Element::kBFloat16:
      return launch<__nv_bfloat16>(a, stream);
    case Element::kFloat16:
      return launch<__half>(a, stream);
    case Element::kFloat32:
      return launch<float>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace liquidgemm
