#include "liquidgemm/host/launch_impl.hpp"

namespace liquidgemm {

constexpr TileShape kTile{8, 1, 2, 4, 2, 1};
template cudaError_t launch<kTile, LiquidQuant, int8_t>(KernelParams const&, int, cudaStream_t);
template cudaError_t launch<kTile, LiquidQuant, __nv_bfloat16>(KernelParams const&,
                                                               int,
                                                               cudaStream_t);
template cudaError_t launch<kTile, LiquidQuant, __half>(KernelParams const&, int, cudaStream_t);

}  // namespace liquidgemm
