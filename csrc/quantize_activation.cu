// Activation quantization: one CTA per token, or for few long ones a cluster of them.
//
//   scale[m] = max_k |x[m, k]| / 127,  out[m, k] = clamp(rint(x[m, k] / scale[m]), -127, 127)
//
// in fp32, rounded as IEEE division and rint are, ties to even. A row with a NaN or an infinity
// gets scale NaN and zeros, so that its outputs, and no others, are NaN; a row of zeros gets scale
// 0.
//
// For few tokens this kernel is latency and nothing else, much of it that of fetching instructions:
// hence two short loops over the row, the second of which finds it in the L1 cache.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/arch/grid_dependency_control.h>

#include <algorithm>

#include "liquidgemm/gemm.hpp"
#include "liquidgemm/kernel/ring.hpp"

namespace liquidgemm {
namespace {

constexpr int kVector = 8;  // elements a thread loads, converts and stores at once
constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 4;
constexpr int64_t kManyVectors = 1 << 19;  // some two for every thread that an H100 can hold
constexpr int64_t kFewCtas = 128;          // leave the GEMM room to start beside them
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
struct alignas(16) Vector {
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
};

// The largest magnitude of some x, as an integer: |x| orders like its bits do, with infinity and
// then NaN above every number.
template <class T>
class Largest {
 public:
  __device__ void add(Vector<T> const& vector) {
    uint32_t const* const words = reinterpret_cast<uint32_t const*>(vector.values);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(vector) / sizeof(uint32_t)); ++i) {
      if constexpr (sizeof(T) == 2) {  // two at a time
        bits_ = __vmaxu2(bits_, words[i] & 0x7fff7fffu);
      } else {
        bits_ = max(bits_, words[i] & 0x7fffffffu);
      }
    }
  }

  // As bits of a float.
  __device__ uint32_t float_bits() const {
    if constexpr (sizeof(T) == 2) {
      const uint16_t largest = max(bits_ & 0xffffu, bits_ >> 16);
      return __float_as_uint(to_float(reinterpret_cast<T const&>(largest)));
    } else {
      return bits_;
    }
  }

 private:
  uint32_t bits_ = 0;
};

// x / scale, rounded to an integer, for one scale and many x.
class Quantizer {
 public:
  // Scales of a common size need neither of the two precautions of the general way.
  __device__ static bool is_common(float scale) { return scale >= kSmallestCommon; }

  __device__ explicit Quantizer(float scale) {
    const bool valid = scale > 0.f;  // else everything becomes 0
    // A power of two leaves the quotient as it is and keeps the reciprocal and remainders normal.
    unit_ = scale < kSmallestCommon ? 1.f / kSmallestCommon : 1.f;
    scale_ = valid ? scale * unit_ : 0.f;
    reciprocal_ = valid ? __frcp_rn(scale_) : 0.f;
  }

  // The low byte is the result.
  template <bool kCommon>
  __device__ uint32_t quantize(float x) const {
    if constexpr (kCommon) {
      constexpr float kRound = 0x1.8p23f;  // leaves no bits for a fraction
      return __float_as_uint(__fadd_rn(divide(x), kRound));
    } else {
      // A scale with few bits left, as of a row of denormals, can leave quotients beyond the range.
      const int rounded = __float2int_rn(divide(x * unit_));
      return max(-kMaxActivation, min(kMaxActivation, rounded));
    }
  }

 private:
  static constexpr float kSmallestCommon = 0x1p-64f;

  // As IEEE division (Markstein, "Computation of elementary functions on the IBM RISC System/6000
  // processor", 1990): with a correctly rounded reciprocal, one correction by the exact remainder
  // rounds the quotient correctly.
  __device__ float divide(float x) const {
    const float approximate = __fmul_rn(x, reciprocal_);
    const float remainder = __fmaf_rn(-approximate, scale_, x);
    return __fmaf_rn(remainder, reciprocal_, approximate);
  }

  float unit_, scale_, reciprocal_;
};

__device__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The threads of a cluster share a row, a vector at a time.
__device__ int64_t first_element() {
  return (int64_t(cute::block_rank_in_cluster()) * blockDim.x + threadIdx.x) * kVector;
}
__device__ int64_t step() {
  return int64_t(cute::cluster_shape().x) * blockDim.x * kVector;
}

template <bool kCommon, class T>
__device__ void quantize_row(
    T const* row, int8_t* out, int64_t k, Quantizer const& quantizer, bool aligned) {
#pragma unroll 2
  for (int64_t at = first_element(); at < k; at += step()) {
    Vector<T> vector;
    vector.load(row + at, k - at, aligned);
    uint32_t bytes[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      bytes[i] = quantizer.quantize<kCommon>(to_float(vector.values[i]));
    if (aligned && k - at >= kVector) {
      *reinterpret_cast<uint2*>(out + at) =
          make_uint2(low_bytes(bytes[0], bytes[1], bytes[2], bytes[3]),
                     low_bytes(bytes[4], bytes[5], bytes[6], bytes[7]));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < k - at)
          out[at + i] = static_cast<int8_t>(bytes[i]);
      }
    }
  }
}

// The largest value of any thread of the cluster, for all of them.
class ClusterMax {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;

 public:
  // Before anything else: peers must not be written to until they are set up.
  __device__ ClusterMax() : size_(cute::cluster_shape().x) {
    if (size_ > 1) {
      if (threadIdx.x == 0) {
        Barrier::init(&shared().arrived, 1);
        cutlass::arch::fence_barrier_init();
        Barrier::arrive_and_expect_tx(&shared().arrived, size_ * sizeof(int4));
      }
      cute::cluster_arrive_relaxed();
      cute::cluster_wait();
    }
  }

  __device__ uint32_t operator()(uint32_t value) const {
    value = __reduce_max_sync(0xffffffffu, value);
    if (threadIdx.x % 32 == 0)
      shared().of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const int warps = blockDim.x / 32;
    value = __reduce_max_sync(0xffffffffu, lane < warps ? shared().of_warp[lane] : 0u);
    if (size_ == 1)
      return value;
    if (threadIdx.x < size_) {
      int4* const place = &shared().of_cta[cute::block_rank_in_cluster()];
      store_at_cluster(peer_address(place, threadIdx.x), make_int4(value, 0, 0, 0),
                       peer_address(&shared().arrived, threadIdx.x));
    }
    Barrier::wait(&shared().arrived, 0);
    return __reduce_max_sync(0xffffffffu, lane < size_ ? shared().of_cta[lane].x : 0u);
  }

 private:
  struct Shared {
    int4 of_cta[kMaxCluster];
    uint64_t arrived;
    uint32_t of_warp[kMaxThreads / 32];
  };
  __device__ static Shared& shared() {
    __shared__ Shared shared;
    return shared;
  }

  uint32_t size_;
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads) quantize_kernel(
    T const* x, int8_t* out, float* scales, int64_t k, int64_t out_stride, bool aligned) {
  // The next kernel, a GEMM, may start to fetch its weights. It waits for this one before it
  // touches anything else, and this one for the kernel before it.
  cutlass::arch::launch_dependent_grids();
  const ClusterMax cluster_max;
  cutlass::arch::wait_on_dependent_grids();

  const int64_t token = cute::cluster_id_in_grid().x;
  T const* const row = x + token * k;
  Largest<T> of_thread;
#pragma unroll 4
  for (int64_t at = first_element(); at < k; at += step()) {
    Vector<T> vector;
    vector.load(row + at, k - at, aligned);
    of_thread.add(vector);
  }
  const uint32_t largest = cluster_max(of_thread.float_bits());

  const float scale = largest < kInfinityBits
                          ? __fdiv_rn(__uint_as_float(largest), float(kMaxActivation))
                          : __uint_as_float(0x7fc00000u);
  if (first_element() == 0)
    scales[token] = scale;
  int8_t* const out_row = out + token * out_stride;
  const Quantizer quantizer(scale);
  if (Quantizer::is_common(scale)) {
    quantize_row<true>(row, out_row, k, quantizer, aligned);
  } else {
    quantize_row<false>(row, out_row, k, quantizer, aligned);
  }
}

template <class T>
cudaError_t launch(QuantizeArguments const& a, cudaStream_t stream) {
  // Few vectors: a thread for each, for latency, in up to four CTAs per row where the GPU has room
  // for them. Many: fewer threads with more each, for throughput.
  const int64_t vectors = ceil_div(a.k, kVector);
  const int64_t all = a.m * vectors;
  const int64_t threads = ceil_div(vectors, all < kManyVectors       ? 1
                                            : all < 2 * kManyVectors ? 2
                                                                     : 4);
  int cluster = 1;
  while (cluster < kMaxCluster && cluster * kMaxThreads < threads && 2 * cluster * a.m <= kFewCtas)
    cluster *= 2;
  const bool aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && a.k * sizeof(T) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(a.out) % kVector == 0 &&
                       a.out_stride % kVector == 0;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(a.m * cluster));
  config.blockDim = dim3(static_cast<unsigned>(
      std::min<int64_t>(kMaxThreads, ceil_div(ceil_div(threads, cluster), 32) * 32)));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
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
