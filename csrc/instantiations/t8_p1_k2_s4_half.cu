#include "liquidgemm/host/launch_impl.hpp"

namespace liquidgemm {

static_assert(is_tile(0, {8, 1, 2, 4, 2}), "this file is named after its tile");
template cudaError_t launch_tile<0, int8_t>(KernelParams const&, int, cudaStream_t);
template cudaError_t launch_tile<0, __nv_bfloat16>(KernelParams const&, int, cudaStream_t);
template cudaError_t launch_tile<0, __half>(KernelParams const&, int, cudaStream_t);

}  // namespace liquidgemm
