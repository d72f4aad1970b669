#include "liquidgemm/formats/int8.hpp"
#include "liquidgemm/host/launch_impl.hpp"
#include "liquidgemm/kernel/schedule/dense.hpp"

namespace liquidgemm {

template cudaError_t launch<TileShape{32, 1, 3, 2}, Int8, int8_t>(DenseParams const&,
                                                                  int,
                                                                  cudaStream_t);

}  // namespace liquidgemm
