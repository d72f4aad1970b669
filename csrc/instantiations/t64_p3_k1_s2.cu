#include "liquidgemm/host/launch.hpp"

namespace liquidgemm {

static_assert(is_tile(9, {64, 3, 1, 2}), "this file is named after its tile");
template <>
cudaError_t launch_tile<9, int8_t>(KernelParams const& params, int clusters, cudaStream_t stream) {
  return launch_tile_impl<9, int8_t>(params, clusters, stream);
}

}  // namespace liquidgemm
