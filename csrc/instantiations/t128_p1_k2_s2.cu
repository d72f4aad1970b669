#include "liquidgemm/host/launch_impl.hpp"

namespace liquidgemm {

static_assert(is_tile(14, {128, 1, 2, 2}), "this file is named after its tile");
template cudaError_t launch_tile<14, int8_t>(KernelParams const&, int, cudaStream_t);

}  // namespace liquidgemm
