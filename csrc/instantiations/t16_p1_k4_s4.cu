#include "liquidgemm/host/launch_impl.hpp"

namespace liquidgemm {

static_assert(is_tile(3, {16, 1, 4, 4}), "this file is named after its tile");
template cudaError_t launch_tile<3, int8_t>(KernelParams const&, int, cudaStream_t);

}  // namespace liquidgemm
