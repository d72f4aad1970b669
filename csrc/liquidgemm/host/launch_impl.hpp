#pragma once

#include "liquidgemm/host/launch.hpp"
#include "liquidgemm/kernel/kernel.hpp"
#include "liquidgemm/kernel/tile.hpp"

namespace liquidgemm {

template <TileShape shape, class Format, class Input, class Work>
cudaError_t launch(KernelParams<Work> const& params, int clusters, cudaStream_t stream) {
  using TileT = Tile<shape, Format, Input>;
  constexpr int kSharedBytes = sizeof(SharedStorage<TileT>) + Work::kScheduleBytes;
  static_assert(kSharedBytes <= TileT::kSharedBytes);
  auto* const kernel = gemm_kernel<TileT, Work>;
  // Cheap, idempotent and per device: no state to keep, nothing lazy that a first call under
  // capture could trip over.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess)
    return error;

  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  const int cluster = params.work.cluster.size();
  config.gridDim = dim3(clusters * cluster);
  config.blockDim = dim3(TileT::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace liquidgemm
