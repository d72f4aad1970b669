#include "liquidgemm/formats/liquidquant.hpp"
#include "liquidgemm/host/launch_impl.hpp"
#include "liquidgemm/kernel/schedule/dense.hpp"

namespace liquidgemm {

template cudaError_t launch<TileShape{8, 1, 4, 4, 1, 2}, LiquidQuant, int8_t>(DenseParams const&,
                                                                              int,
                                                                              cudaStream_t);
template cudaError_t launch<TileShape{8, 1, 4, 4, 1, 2}, LiquidQuant, __nv_bfloat16>(
    DenseParams const&, int, cudaStream_t);
template cudaError_t launch<TileShape{8, 1, 4, 4, 1, 2}, LiquidQuant, __half>(DenseParams const&,
                                                                              int,
                                                                              cudaStream_t);

}  // namespace liquidgemm
