// Launching one compiled tile. The definition is in launch_impl.hpp, for csrc/instantiations alone:
// each tile's kernels are compiled in a translation unit of their own.
#pragma once

#include <cuda_runtime_api.h>

#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/tile_shape.hpp"

namespace liquidgemm {

// The runtime reports a cluster that does not fit as an error.
template <TileShape shape, class Format, class Input, class Work>
cudaError_t launch(KernelParams<Work> const& params, int clusters, cudaStream_t stream);

}  // namespace liquidgemm
