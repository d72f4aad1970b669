#include "liquidgemm/host/launch.hpp"

namespace liquidgemm {

static_assert(is_tile(1, {8, 1, 4, 4}), "this file is named after its tile");
template <>
cudaError_t launch_tile<1, int8_t>(KernelParams const& params, int clusters, cudaStream_t stream) {
  return launch_tile_impl<1, int8_t>(params, clusters, stream);
}
template <>
cudaError_t launch_tile<1, __nv_bfloat16>(KernelParams const& params,
                                          int clusters,
                                          cudaStream_t stream) {
  return launch_tile_impl<1, __nv_bfloat16>(params, clusters, stream);
}
template <>
cudaError_t launch_tile<1, __half>(KernelParams const& params, int clusters, cudaStream_t stream) {
  return launch_tile_impl<1, __half>(params, clusters, stream);
}

}  // namespace liquidgemm
