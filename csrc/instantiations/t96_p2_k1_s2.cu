#include "liquidgemm/host/launch_impl.hpp"

namespace liquidgemm {

static_assert(is_tile(12, {96, 2, 1, 2}), "this file is named after its tile");
template cudaError_t launch_tile<12, int8_t>(KernelParams const&, int, cudaStream_t);

}  // namespace liquidgemm
