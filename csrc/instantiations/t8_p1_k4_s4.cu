#include "liquidgemm/host/launch.hpp"

namespace liquidgemm {

static_assert(is_tile(1, {8, 1, 4, 4}), "this file is named after its tile");
template <>
cudaError_t launch_tile<1>(KernelParams const& params, int clusters, cudaStream_t stream) {
  return launch_tile_impl<1>(params, clusters, stream);
}

}  // namespace liquidgemm
