// Launching kernels that may start while the one before them runs.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

namespace liquidgemm {

// The kernel has to wait for the one before it by griddepcontrol.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...),
                         dim3 grid,
                         int threads,
                         int shared_bytes,
                         cudaStream_t stream,
                         Arguments&&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace liquidgemm
