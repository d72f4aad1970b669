// Launching kernels that may start while the one before them runs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <utility>

#include "liquidgemm/common/element.hpp"

namespace liquidgemm {

struct LaunchShape {
  dim3 grid;  // CTAs, a multiple of the cluster along x
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
};

// As programmatic dependent launch: the kernel has to wait for the one before it.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...),
                         LaunchShape const& shape,
                         cudaStream_t stream,
                         Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// Calls `launch` with a value of the type; cudaErrorInvalidValue for those that activations never
// have.
template <class Launch>
cudaError_t launch_for(Element type, Launch const& launch) {
  switch (type) {
    case Element::kBFloat16:
      return launch(__nv_bfloat16{});
    case Element::kFloat16:
      return launch(__half{});
    case Element::kFloat32:
      return launch(float{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace liquidgemm
