// The parts of decode attention, each compiled in a file of its own.
#pragma once

#include <cuda_runtime_api.h>

#include "liquidgemm/attention/arguments.hpp"

namespace liquidgemm::attention {

cudaError_t decode_int8(KvAttentionArguments const& arguments, cudaStream_t stream);
cudaError_t decode_int4(KvAttentionArguments const& arguments, cudaStream_t stream);

// Adds the partial results of chunks.
cudaError_t combine(KvAttentionArguments const& arguments, cudaStream_t stream);

}  // namespace liquidgemm::attention
