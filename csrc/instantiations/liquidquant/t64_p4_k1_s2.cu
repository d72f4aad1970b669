#include "liquidgemm/formats/liquidquant.hpp"
#include "liquidgemm/host/launch_impl.hpp"
#include "liquidgemm/kernel/schedule/dense.hpp"

namespace liquidgemm {

template cudaError_t launch<TileShape{64, 4, 1, 2}, LiquidQuant, int8_t>(DenseParams const&,
                                                                         int,
                                                                         cudaStream_t);

}  // namespace liquidgemm
