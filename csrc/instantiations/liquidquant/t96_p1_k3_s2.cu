#include "liquidgemm/host/launch_impl.hpp"

namespace liquidgemm {

constexpr TileShape kTile{96, 1, 3, 2};
template cudaError_t launch<kTile, LiquidQuant, int8_t>(KernelParams const&, int, cudaStream_t);

}  // namespace liquidgemm
