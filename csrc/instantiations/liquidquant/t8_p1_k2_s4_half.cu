#include "liquidgemm/formats/liquidquant.hpp"
#include "liquidgemm/host/launch_impl.hpp"
#include "liquidgemm/kernel/schedule/dense.hpp"

namespace liquidgemm {

constexpr TileShape kTile{8, 1, 2, 4, 2, 1};
template cudaError_t launch<kTile, LiquidQuant, int8_t>(DenseParams const&, int, cudaStream_t);
template cudaError_t launch<kTile, LiquidQuant, __nv_bfloat16>(DenseParams const&,
                                                               int,
                                                               cudaStream_t);
template cudaError_t launch<kTile, LiquidQuant, __half>(DenseParams const&, int, cudaStream_t);

}  // namespace liquidgemm
