// Packing and unpacking on the GPU: one CTA per block, one thread per row, through the functions of
// formats/liquidquant.hpp.
#include "liquidgemm/pack.hpp"

#include "liquidgemm/common/math.hpp"
#include "liquidgemm/formats/liquidquant.hpp"

namespace liquidgemm {
namespace {

__global__ void pack_kernel(LogicalWeight logical, uint8_t* packed, int* infeasible) {
  const int64_t panel = blockIdx.x / logical.k_blocks;
  const int64_t k_block = blockIdx.x % logical.k_blocks;
  if (!LiquidQuant::pack_row(logical, panel, k_block, LiquidQuant::row(threadIdx.x),
                             packed + blockIdx.x * int64_t(LiquidQuant::kBlockBytes))) {
    *infeasible = 1;
  }
}

__global__ void unpack_kernel(uint8_t const* packed, LogicalWeight logical) {
  const int64_t panel = blockIdx.x / logical.k_blocks;
  const int64_t k_block = blockIdx.x % logical.k_blocks;
  LiquidQuant::unpack_row(packed + blockIdx.x * int64_t(LiquidQuant::kBlockBytes), panel, k_block,
                          LiquidQuant::row(threadIdx.x), logical);
}

dim3 blocks(LogicalWeight const& logical) {
  return dim3(static_cast<unsigned>(ceil_div(logical.n, kBlockRows) * logical.k_blocks));
}

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k_blocks) {
  return ceil_div(n, kBlockRows) * k_blocks * LiquidQuant::kBlockBytes;
}

cudaError_t pack_weight(LogicalWeight const& logical,
                        uint8_t* packed,
                        int* infeasible,
                        cudaStream_t stream) {
  pack_kernel<<<blocks(logical), kBlockRows, 0, stream>>>(logical, packed, infeasible);
  return cudaGetLastError();
}

cudaError_t unpack_weight(uint8_t const* packed,
                          LogicalWeight const& logical,
                          cudaStream_t stream) {
  unpack_kernel<<<blocks(logical), kBlockRows, 0, stream>>>(packed, logical);
  return cudaGetLastError();
}

}  // namespace liquidgemm
