#include "liquidgemm/host/launch.hpp"

namespace liquidgemm {

static_assert(is_tile(0, {8, 1, 2, 4, 2}), "this file is named after its tile");
template <>
cudaError_t launch_tile<0, int8_t>(KernelParams const& params, int clusters, cudaStream_t stream) {
  return launch_tile_impl<0, int8_t>(params, clusters, stream);
}
template <>
cudaError_t launch_tile<0, __nv_bfloat16>(KernelParams const& params,
                                          int clusters,
                                          cudaStream_t stream) {
  return launch_tile_impl<0, __nv_bfloat16>(params, clusters, stream);
}
template <>
cudaError_t launch_tile<0, __half>(KernelParams const& params, int clusters, cudaStream_t stream) {
  return launch_tile_impl<0, __half>(params, clusters, stream);
}

}  // namespace liquidgemm
