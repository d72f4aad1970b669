// The parts of decode attention, each compiled in a file of its own, and their choice by head_dim.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "liquidgemm/attention/arguments.hpp"

namespace liquidgemm::attention {

cudaError_t decode_int8(KvAttentionArguments const& arguments, cudaStream_t stream);
cudaError_t decode_int4(KvAttentionArguments const& arguments, cudaStream_t stream);

// Adds the partial results of chunks, where there is more than one.
cudaError_t combine(KvAttentionArguments const& arguments, cudaStream_t stream);

// Calls `launch` with the head dimension as a type; cudaErrorInvalidValue for those that there are
// not.
template <class Launch>
cudaError_t for_head_dim(int head_dim, Launch const& launch) {
  switch (head_dim) {
    case 64:
      return launch(std::integral_constant<int, 64>());
    case 128:
      return launch(std::integral_constant<int, 128>());
    case 256:
      return launch(std::integral_constant<int, 256>());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace liquidgemm::attention
