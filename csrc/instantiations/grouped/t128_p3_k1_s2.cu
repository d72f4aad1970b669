#include "liquidgemm/formats/liquidquant.hpp"
#include "liquidgemm/host/launch_impl.hpp"
#include "liquidgemm/kernel/schedule/grouped.hpp"

namespace liquidgemm {

template cudaError_t launch<TileShape{128, 3, 1, 2}, LiquidQuant, int8_t>(GroupedParams const&,
                                                                          int,
                                                                          cudaStream_t);

}  // namespace liquidgemm
