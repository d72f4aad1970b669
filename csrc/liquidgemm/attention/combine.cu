// The results of sequences of more than one chunk.
#include "liquidgemm/attention/launch.hpp"
#include "liquidgemm/attention/merge.hpp"
#include "liquidgemm/common/grid_dependency.hpp"
#include "liquidgemm/common/launch.hpp"
#include "liquidgemm/common/math.hpp"
#include "liquidgemm/kv.hpp"

namespace liquidgemm {
namespace attention {
namespace {

constexpr int kWarps = 4;

template <class Shape>
__global__ void __launch_bounds__(32 * kWarps)
    combine_kernel(const __grid_constant__ KvAttentionArguments a, int max_chunks) {
  launch_dependent_grids();
  const int b = blockIdx.y, rows = a.queries * a.group;
  const int index = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= a.cache.heads * rows)
    return;
  const int h = index / rows, row = index % rows;
  const Chunks chunks = chunks_of<Shape>(a, b);  // decode_kernel has waited for its lengths
  const int64_t place = (static_cast<int64_t>(b) * a.cache.heads + h) * max_chunks;
  // For those that decode_kernel has finished, too: what follows waits for this kernel alone.
  wait_on_dependent_grids();
  if (chunks.end - chunks.begin <= 1)
    return;

  merge_row<Shape>(
      a, b, h, row, chunks,
      [&](int chunk) { return a.partial + ((place + chunk) * rows + row) * Shape::kHeadDim; },
      [&](int chunk) { return a.stats + (place + chunk) * rows + row; });
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
  return for_shape(a.cache.format, a.cache.head_dim, [&](auto shape) {
    using Shape = decltype(shape);
    // The decode kernel finishes sequences of one chunk.
    return max_chunks<Shape>(a.cache.capacity) == 1 ? cudaSuccess : launch<Shape>(a, stream);
  });
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
  if (error != cudaSuccess)
    return error;
  return attention::combine(a, stream);
}

}  // namespace liquidgemm
