// Activation quantization: one CTA per token, or for few long ones a cluster of them. The formula
// is that of producers/quantizer.hpp.
//
// A thread keeps its part of the row in registers between the maximum and the division. For few
// tokens this kernel is latency and nothing else, much of it that of fetching instructions: each
// thread has one vector then, and the code is short. For many it runs at the speed of memory.
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>

#include <algorithm>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/common/math.hpp"
#include "liquidgemm/producers/quantizer.hpp"
#include "liquidgemm/quantize.hpp"

namespace liquidgemm {
namespace {

constexpr int kMaxCluster = 4;
constexpr int64_t kManyVectors = 1 << 19;     // some two for every thread that an H100 can hold
constexpr int64_t kFewCtas = 128;             // leave the GEMM room to start beside them
constexpr int64_t kStreamedBytes = 12 << 20;  // with what is written, about half of the L2 cache

// Vectors that a thread can hold, and how many threads then have the registers for it.
constexpr int kMaxHeld = 8;
constexpr int max_threads(int held) {
  return held == kMaxHeld ? kMaxQuantizerThreads / 2 : kMaxQuantizerThreads;
}

// The threads of a cluster share a row, a vector at a time.
__device__ int64_t first_element() {
  return (int64_t(cute::block_rank_in_cluster()) * blockDim.x + threadIdx.x) * kVector;
}
__device__ int64_t step() {
  return int64_t(cute::cluster_shape().x) * blockDim.x * kVector;
}

__device__ void store(int8_t* to, uint2 bytes, int64_t count, bool aligned) {
  if (aligned && count >= kVector) {
    *reinterpret_cast<uint2*>(to) = bytes;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count)
        to[i] = static_cast<int8_t>((i < 4 ? bytes.x : bytes.y) >> i % 4 * 8);
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
    uint32_t of_warp[kMaxQuantizerThreads / 32];
  };
  __device__ static Shared& shared() {
    __shared__ Shared shared;
    return shared;
  }

  uint32_t size_;
};

template <class T>
struct Row {
  T const* x;
  int8_t* out;
  int64_t k;
  bool aligned;   // x and out: whole vectors
  bool streamed;  // x

  __device__ void load(Vector<T>& vector, int64_t at) const {
    vector.load(x + at, k - at, aligned, streamed);
  }

  template <bool kCommon, int kHeld>
  __device__ void quantize(Quantizer const& quantizer, Vector<T> const (&held)[kHeld]) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t at = first_element() + i * step();
      store(out + at, quantizer.quantize<kCommon>(held[i]), k - at, aligned);
    }
#pragma unroll 1
    for (int64_t at = first_element() + kHeld * step(); at < k; at += step()) {
      Vector<T> vector;
      load(vector, at);
      store(out + at, quantizer.quantize<kCommon>(vector), k - at, aligned);
    }
  }
};

// `kHeld` vectors of each thread stay in registers; what a longer row has beyond them is read
// twice.
template <class T, int kHeld>
__global__ void __launch_bounds__(max_threads(kHeld)) quantize_kernel(T const* x,
                                                                      int8_t* out,
                                                                      float* scales,
                                                                      int64_t k,
                                                                      int64_t out_stride,
                                                                      bool aligned,
                                                                      bool streamed) {
  // The next kernel, a GEMM, may start to fetch its weights. It waits for this one before it
  // touches anything else, and this one for the kernel before it.
  cutlass::arch::launch_dependent_grids();
  const ClusterMax cluster_max;
  cutlass::arch::wait_on_dependent_grids();

  const int64_t token = cute::cluster_id_in_grid().x;
  const Row<T> row{x + token * k, out + token * out_stride, k, aligned, streamed};
  Vector<T> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    row.load(held[i], first_element() + i * step());
  Largest<T> of_thread;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    of_thread.add(held[i]);
#pragma unroll 1
  for (int64_t at = first_element() + kHeld * step(); at < k; at += step()) {
    Vector<T> vector;
    row.load(vector, at);
    of_thread.add(vector);
  }
  const float scale = activation_scale(cluster_max(of_thread.float_bits()));
  if (first_element() == 0)
    scales[token] = scale;
  const Quantizer quantizer(scale);
  if (Quantizer::is_common(scale)) {
    row.template quantize<true>(quantizer, held);
  } else {
    row.template quantize<false>(quantizer, held);
  }
}

template <class T>
auto kernel_holding(int held) {
  switch (held) {
    case 1:
      return quantize_kernel<T, 1>;
    case 2:
      return quantize_kernel<T, 2>;
    case 4:
      return quantize_kernel<T, 4>;
    default:
      return quantize_kernel<T, kMaxHeld>;
  }
}

template <class T>
cudaError_t launch(QuantizeArguments const& a, cudaStream_t stream) {
  const int64_t vectors = ceil_div(a.k, kVector);
  // Few: a thread for each vector, and for long rows up to four CTAs where the GPU has room for
  // them. Many: at least two per thread, and several CTAs to an SM, so that some load while others
  // wait.
  const bool few = a.m * vectors < kManyVectors;
  int cluster = 1;
  while (few && vectors > kMaxQuantizerThreads && cluster < kMaxCluster &&
         2 * cluster * a.m <= kFewCtas)
    cluster *= 2;
  int held = few ? 1 : 2;
  const auto most_threads = [&] { return few ? max_threads(held) : kMaxQuantizerThreads / 2; };
  while (held < kMaxHeld && int64_t(cluster) * held * most_threads() < vectors)
    held *= 2;
  const int64_t threads =
      std::min<int64_t>(most_threads(), ceil_div(ceil_div(vectors, cluster * held), 32) * 32);
  const bool aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && a.k * sizeof(T) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(a.out) % kVector == 0 &&
                       a.out_stride % kVector == 0;
  const bool streamed = a.m * a.k * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(a.m * cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel_holding<T>(held), static_cast<T const*>(a.x), a.out,
                            a.scale, a.k, a.out_stride, aligned, streamed);
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
