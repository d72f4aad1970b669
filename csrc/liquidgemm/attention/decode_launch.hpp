// Chooses a decode kernel by head_dim and query rows, and how it copies by the number of chunks,
// which changes no bit; and launches it.
#pragma once

#include <algorithm>

#include "liquidgemm/attention/decode_kernel.hpp"
#include "liquidgemm/attention/launch.hpp"
#include "liquidgemm/common/launch.hpp"
#include "liquidgemm/common/math.hpp"

namespace liquidgemm::attention {

template <class Shape>
cudaError_t launch_decode(KvAttentionArguments const& a, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared<Shape>);
  static const cudaError_t prepared = cudaFuncSetAttribute(
      decode_kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (prepared != cudaSuccess)
    return prepared;
  // At most. The CTAs of a sequence that has more chunks take several each.
  constexpr int kCtasPerSm = 16;
  const int chunks = max_chunks<Shape>(a.cache.capacity);
  const int64_t pairs = static_cast<int64_t>(a.batch) * a.cache.heads;
  const int64_t wanted = std::max<int64_t>(8, ceil_div(kCtasPerSm * a.num_sms, pairs));
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(chunks, wanted));
  const int row_groups = static_cast<int>(ceil_div(a.queries * a.group, Shape::kRows));
  // CTAs without a chunk come last, or every second or third SM would get none but those.
  const dim3 grid(static_cast<unsigned>(a.cache.heads * row_groups), static_cast<unsigned>(a.batch),
                  ctas);
  return launch_early(decode_kernel<Shape>,
                      {.grid = grid, .threads = Shape::kThreads, .shared_bytes = kSharedBytes},
                      stream, a, chunks, row_groups);
}

template <KvFormat kFormat, int kHeadDim, Copies kCopies>
cudaError_t launch_decode(KvAttentionArguments const& a, cudaStream_t stream) {
  const int rows = a.queries * a.group;
  if (rows <= 4)
    return launch_decode<DecodeShape<kFormat, kHeadDim, 1, kCopies>>(a, stream);
  constexpr int kMostTiles = kHeadDim == 256 ? 2 : 4;  // by registers
  return rows <= 8 ? launch_decode<DecodeShape<kFormat, kHeadDim, 2, kCopies>>(a, stream)
                   : launch_decode<DecodeShape<kFormat, kHeadDim, kMostTiles, kCopies>>(a, stream);
}

// Bulk copies start later than copies of lines and then keep up with memory: they gain where SMs
// have many chunks. Both give the same bits. Measured for head_dim 128; see "Bulk copies" in
// docs/experiments/kv.md.
template <KvFormat kFormat>
bool bulk_copies_pay(KvAttentionArguments const& a) {
  constexpr int kLeastChunksPerSm = kFormat == KvFormat::kInt4 ? 16 : 2;
  using Shape = DecodeShape<kFormat, 128, 1>;
  const int64_t chunks =
      static_cast<int64_t>(a.batch) * a.cache.heads * max_chunks<Shape>(a.cache.capacity);
  return a.cache.head_dim == 128 && chunks >= int64_t{kLeastChunksPerSm} * a.num_sms;
}

template <KvFormat kFormat>
cudaError_t launch_decode(KvAttentionArguments const& a, cudaStream_t stream) {
  if (bulk_copies_pay<kFormat>(a))
    return launch_decode<kFormat, 128, Copies::kBulk>(a, stream);
  return for_head_dim(a.cache.head_dim, [&](auto head_dim) {
    return launch_decode<kFormat, decltype(head_dim)::value, Copies::kLines>(a, stream);
  });
}

}  // namespace liquidgemm::attention
