// Launching one compiled tile. The definition is in launch_impl.hpp, for csrc/instantiations alone:
// each tile's kernels are compiled in a translation unit of their own.
#pragma once

#include <cuda_runtime_api.h>

#include "liquidgemm/kernel/params.hpp"

namespace liquidgemm {

// Input as in Tile. A cluster that does not fit is reported as an error by the runtime.
template <int TileIndex, class Input>
cudaError_t launch_tile(KernelParams const& params, int clusters, cudaStream_t stream);

}  // namespace liquidgemm
