#include "liquidgemm/formats/liquidquant.hpp"
#include "liquidgemm/host/launch_impl.hpp"
#include "liquidgemm/kernel/schedule/grouped.hpp"

namespace liquidgemm {

constexpr TileShape kTile{64, 3, 1, 2};
template cudaError_t launch<kTile, LiquidQuant, int8_t>(GroupedParams const&, int, cudaStream_t);

}  // namespace liquidgemm
