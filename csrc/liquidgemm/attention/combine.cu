// Adds the partial results of a sequence's chunks, in their order: a warp per query row.
#include <cuda_bf16.h>
#include <cutlass/arch/grid_dependency_control.h>

#include "liquidgemm/attention/launch.hpp"
#include "liquidgemm/attention/ptx.hpp"
#include "liquidgemm/attention/rows.hpp"
#include "liquidgemm/attention/shape.hpp"
#include "liquidgemm/common/launch.hpp"
#include "liquidgemm/common/math.hpp"
#include "liquidgemm/kv.hpp"

namespace liquidgemm {
namespace attention {
namespace {

constexpr int kWarps = 4;
static_assert(kKvMaxChunks == 64, "two for each lane");

CUTE_DEVICE void store_element(void* out, int64_t at, Element type, float value) {
  if (type == Element::kBFloat16)
    static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(value);
  else if (type == Element::kFloat16)
    static_cast<__half*>(out)[at] = __float2half_rn(value);
  else
    static_cast<float*>(out)[at] = value;
}

template <class Shape>
__global__ void __launch_bounds__(32 * kWarps)
    combine_kernel(const __grid_constant__ KvAttentionArguments a, int max_chunks) {
  cutlass::arch::launch_dependent_grids();
  constexpr int kHeld = Shape::kHeadDim / 32;
  const int lane = threadIdx.x % 32;
  const int b = blockIdx.y, rows = a.queries * a.group;
  const int index = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= a.cache.heads * rows)
    return;
  const int h = index / rows, row = index % rows;
  const Chunks chunks = chunks_of<Shape>(a, b);  // decode_kernel has waited for its lengths
  const int64_t place = (static_cast<int64_t>(b) * a.cache.heads + h) * max_chunks;
  cutlass::arch::wait_on_dependent_grids();

  // The first chunks are asked for before their weights are known.
  constexpr int kAhead = 4;
  const auto load = [&](float (&held)[kHeld], int chunk) {
    float const* const partial = a.partial + ((place + chunk) * rows + row) * Shape::kHeadDim;
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      held[i] = chunk < chunks.end ? partial[lane + 32 * i] : 0.f;
  };
  float ahead[kAhead][kHeld];
  CUTE_UNROLL
  for (int i = 0; i < kAhead; ++i)
    load(ahead[i], chunks.begin + i);

  // Chunk c is lane c % 32's.
  float most[2], total = 0, weight[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int chunk = lane + 32 * i;
    const bool used = chunk >= chunks.begin && chunk < chunks.end;
    float const* const stats = a.stats + (place + chunk) * 2 * rows + row;
    most[i] = used ? stats[0] : -INFINITY;
    weight[i] = used ? stats[rows] : 0;
  }
  const float largest = warp_max(fmaxf(most[0], most[1]));
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float factor = most[i] > -INFINITY ? exp2_approximate(most[i] - largest) : 0.f;
    total += weight[i] * factor;
    weight[i] = factor;
  }
  CUTE_UNROLL
  for (int stride = 16; stride > 0; stride /= 2)
    total += __shfl_xor_sync(kAllLanes, total, stride);

  float sum[kHeld] = {};
  const auto add = [&](float const(&held)[kHeld], int chunk) {
    const float factor = __shfl_sync(kAllLanes, chunk < 32 ? weight[0] : weight[1], chunk % 32);
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      sum[i] = fmaf(held[i], factor, sum[i]);
  };
  CUTE_UNROLL
  for (int i = 0; i < kAhead; ++i)
    add(ahead[i], chunks.begin + i);  // past the end: nothing
#pragma unroll 4
  for (int chunk = chunks.begin + kAhead; chunk < chunks.end; ++chunk) {
    float held[kHeld];
    load(held, chunk);
    add(held, chunk);
  }
  if constexpr (Shape::kInt4) {  // values are rotated
    rotate(sum);
    CUTE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      sum[i] *= 1.f / Shape::kHeadDim;
  }
  const int64_t token = static_cast<int64_t>(b) * a.queries + row / a.group;
  const int64_t at = ((token * a.cache.heads + h) * a.group + row % a.group) * Shape::kHeadDim;
  CUTE_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    // Zeros where a query sees no token.
    const float value = total == 0 ? 0.f : sum[i] / total;
    store_element(a.out, at + lane + 32 * i, a.type, value);
  }
}

template <class Shape>
cudaError_t launch(KvAttentionArguments const& a, cudaStream_t stream) {
  const int64_t warps = static_cast<int64_t>(a.cache.heads) * a.queries * a.group;
  const dim3 grid(static_cast<unsigned>(ceil_div(warps, kWarps)), static_cast<unsigned>(a.batch));
  return launch_early(combine_kernel<Shape>, {.grid = grid, .threads = 32 * kWarps}, stream, a,
                      max_chunks<Shape>(a.cache.capacity));
}

// Calls f with the shape of the format and head_dim.
template <class F>
cudaError_t for_shape(KvFormat format, int head_dim, F const& f) {
  return for_head_dim(head_dim, [&](auto width) {
    constexpr int kHeadDim = decltype(width)::value;
    return format == KvFormat::kInt8 ? f(DecodeShape<KvFormat::kInt8, kHeadDim, 1>())
                                     : f(DecodeShape<KvFormat::kInt4, kHeadDim, 1>());
  });
}

}  // namespace

cudaError_t combine(KvAttentionArguments const& a, cudaStream_t stream) {
  return for_shape(a.cache.format, a.cache.head_dim,
                   [&](auto shape) { return launch<decltype(shape)>(a, stream); });
}

}  // namespace attention

int kv_max_chunks(KvFormat format, int head_dim, int capacity) {
  int chunks = 0;
  attention::for_shape(format, head_dim, [&](auto shape) {
    chunks = attention::max_chunks<decltype(shape)>(capacity);
    return cudaSuccess;
  });
  return chunks;
}

cudaError_t kv_attention(KvAttentionArguments const& a, cudaStream_t stream) {
  if (a.batch == 0 || a.queries == 0 || a.group == 0 || a.cache.heads == 0)
    return cudaSuccess;
  const cudaError_t error = a.cache.format == KvFormat::kInt8 ? attention::decode_int8(a, stream)
                                                              : attention::decode_int4(a, stream);
  return error == cudaSuccess ? attention::combine(a, stream) : error;
}

}  // namespace liquidgemm
