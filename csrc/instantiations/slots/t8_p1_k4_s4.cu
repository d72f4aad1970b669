#include "liquidgemm/formats/liquidquant.hpp"
#include "liquidgemm/host/launch_impl.hpp"
#include "liquidgemm/kernel/schedule/slots.hpp"

namespace liquidgemm {

template cudaError_t launch<TileShape{8, 1, 4, 4}, LiquidQuant, __nv_bfloat16>(SlotParams const&,
                                                                               int,
                                                                               cudaStream_t);
template cudaError_t launch<TileShape{8, 1, 4, 4}, LiquidQuant, __half>(SlotParams const&,
                                                                        int,
                                                                        cudaStream_t);

}  // namespace liquidgemm
