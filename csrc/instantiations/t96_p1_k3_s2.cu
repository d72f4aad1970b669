#include "liquidgemm/host/launch_impl.hpp"

namespace liquidgemm {

static_assert(is_tile(11, {96, 1, 3, 2}), "this file is named after its tile");
template cudaError_t launch_tile<11, int8_t>(KernelParams const&, int, cudaStream_t);

}  // namespace liquidgemm
