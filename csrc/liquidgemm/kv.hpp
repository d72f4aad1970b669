// Keys and values in 8 or 4 bits: writing them to a cache, and decode attention over it. The number
// format and the layouts are those of liquidgemm/kv/format.py.
#pragma once

#include <cuda_runtime_api.h>

#include "liquidgemm/attention/arguments.hpp"

namespace liquidgemm {

// Enqueues the writing of the last `tokens` tokens of every sequence. Returns cudaErrorInvalidValue
// for types and head dimensions that there are not, otherwise what the launch returns.
cudaError_t kv_write(KvWriteArguments const& arguments, cudaStream_t stream);

// Chunks that a sequence of `capacity` tokens is split into at most; 0 for a head_dim that there is
// not.
int kv_max_chunks(KvFormat format, int head_dim, int capacity);

// Enqueues attention of the last `queries` tokens of every sequence. Needs as workspace
// partial = float [batch, heads, kv_max_chunks(), queries * group, head_dim] and
// stats = float2 [batch, heads, kv_max_chunks(), queries * group].
cudaError_t kv_attention(KvAttentionArguments const& arguments, cudaStream_t stream);

}  // namespace liquidgemm
