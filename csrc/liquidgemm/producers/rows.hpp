// How producers divide rows among CTAs and threads, and what those of a row share: one CTA per
// token, or for long ones a cluster of them.
#pragma once

#include <cutlass/arch/barrier.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/common/launch.hpp"
#include "liquidgemm/common/math.hpp"
#include "liquidgemm/producers/quantizer.hpp"

namespace liquidgemm {
namespace {

constexpr int kMaxCluster = 4;
constexpr int64_t kManyVectors = 1 << 19;     // some two for every thread that an H100 can hold
constexpr int64_t kFewCtas = 128;             // leave the GEMM room to start beside them
constexpr int64_t kStreamedBytes = 12 << 20;  // with what is written, about half of the L2 cache

// Vectors that a thread can hold.
constexpr int kMaxHeld = 8;

constexpr int64_t kNoClusters = INT64_MAX;

struct RowDivision {
  int cluster;  // CTAs of a row
  int held;     // vectors of a thread that stay in registers: 1, 2, 4 or kMaxHeld
  int threads;  // of a CTA
};

// Which long rows have clusters of up to four CTAs: few rows, where the GPU has room for them, and
// many rows of more than `many` vectors for each CTA.
struct RowClusters {
  bool few;
  int64_t many;
};

// `max_threads(held)`: those that have the registers for it. Few rows: a thread for each vector.
// Many: at least two vectors per thread, and several CTAs to an SM, so that some load while others
// wait.
template <class MaxThreads>
RowDivision divide_rows(int64_t m, int64_t k, RowClusters clusters, MaxThreads max_threads) {
  const int64_t vectors = ceil_div(k, kVector);
  const bool few = m * vectors < kManyVectors;
  const auto wants_more = [&](int cluster) {
    if (few)
      return clusters.few && vectors > kMaxQuantizerThreads && 2 * cluster * m <= kFewCtas;
    return vectors > cluster * clusters.many;
  };
  int cluster = 1;
  while (cluster < kMaxCluster && wants_more(cluster))
    cluster *= 2;
  int held = few ? 1 : 2;
  const auto most_threads = [&] {
    return few ? max_threads(held) : std::min(max_threads(held), kMaxQuantizerThreads / 2);
  };
  while (held < kMaxHeld && int64_t(cluster) * held * most_threads() < vectors)
    held *= 2;
  const int64_t threads =
      std::min<int64_t>(most_threads(), ceil_div(ceil_div(vectors, cluster * held), 32) * 32);
  return {cluster, held, static_cast<int>(threads)};
}

// Whether rows that are read once should not push others out of the L2 cache.
inline bool is_streamed(int64_t bytes) {
  return bytes >= kStreamedBytes;
}

// Whether whole vectors of every row can be read or written at once.
inline bool has_aligned_rows(void const* rows, int64_t stride_bytes, int64_t vector_bytes) {
  return reinterpret_cast<uintptr_t>(rows) % vector_bytes == 0 && stride_bytes % vector_bytes == 0;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_rows(void (*kernel)(Parameters...),
                        RowDivision const& division,
                        int64_t m,
                        cudaStream_t stream,
                        Arguments&&... arguments) {
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(m * division.cluster)),
                          .threads = division.threads,
                          .cluster = division.cluster};
  return launch_early(kernel, shape, stream, std::forward<Arguments>(arguments)...);
}

// The threads of a cluster share a row, a vector at a time.
CUTE_DEVICE int64_t first_element() {
  return (int64_t(cute::block_rank_in_cluster()) * blockDim.x + threadIdx.x) * kVector;
}
CUTE_DEVICE int64_t step() {
  return int64_t(cute::cluster_shape().x) * blockDim.x * kVector;
}

CUTE_DEVICE void store(int8_t* to, uint2 bytes, int64_t count, bool aligned) {
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

// The largest value of any thread of the CTA, for all of them. `of_warp`, in shared memory, has a
// place for each warp.
CUTE_DEVICE uint32_t max_of_cta(uint32_t value, uint32_t* of_warp) {
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0)
    of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  return __reduce_max_sync(0xffffffffu, lane < warps ? of_warp[lane] : 0u);
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
    value = max_of_cta(value, shared().of_warp);
    if (size_ == 1)
      return value;
    if (threadIdx.x < size_) {
      int4* const place = &shared().of_cta[cute::block_rank_in_cluster()];
      store_at_cluster(peer_address(place, threadIdx.x), make_int4(value, 0, 0, 0),
                       peer_address(&shared().arrived, threadIdx.x));
    }
    Barrier::wait(&shared().arrived, 0);
    const int lane = threadIdx.x % 32;
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

// Quantizes a row by its scale: the vectors that the thread holds, then the rest of a long row,
// each of which `again(vector, at)` makes anew. `store(bytes, at)` takes the results.
template <class T, int kHeld, class Again, class Store>
CUTE_DEVICE void quantize_row(float scale,
                              Vector<T> const (&held)[kHeld],
                              int64_t k,
                              Again const& again,
                              Store const& store) {
  const Quantizer quantizer(scale);
  const auto quantize = [&](auto common) {
    constexpr bool kCommon = decltype(common)::value;
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      store(quantizer.quantize<kCommon>(held[i]), first_element() + i * step());
#pragma unroll 1
    for (int64_t at = first_element() + kHeld * step(); at < k; at += step()) {
      Vector<T> vector;
      again(vector, at);
      store(quantizer.quantize<kCommon>(vector), at);
    }
  };
  if (Quantizer::is_common(scale)) {
    quantize(std::true_type{});
  } else {
    quantize(std::false_type{});
  }
}

}  // namespace
}  // namespace liquidgemm
