#include "liquidgemm/formats/liquidquant_g32.hpp"
#include "liquidgemm/host/launch_impl.hpp"
#include "liquidgemm/kernel/schedule/dense.hpp"

namespace liquidgemm {

template cudaError_t launch<TileShape{32, 1, 3, 2}, LiquidQuantG32, int8_t>(DenseParams const&,
                                                                            int,
                                                                            cudaStream_t);

}  // namespace liquidgemm
