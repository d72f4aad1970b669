// Packing and unpacking on the GPU: one CTA per block, one thread per row, through the functions of
// the formats.
#include "liquidgemm/common/math.hpp"
#include "liquidgemm/formats/formats.hpp"
#include "liquidgemm/pack.hpp"

namespace liquidgemm {
namespace {

// *infeasible, unless null, becomes 1 if some weight is not representable.
template <class Format>
__global__ void pack_kernel(typename Format::Logical logical, uint8_t* packed, int* infeasible) {
  const int64_t panel = blockIdx.x / logical.k_blocks;
  const int64_t k_block = blockIdx.x % logical.k_blocks;
  if (!Format::pack_row(logical, panel, k_block, Format::row(threadIdx.x),
                        packed + blockIdx.x * int64_t(Format::kBlockBytes)) &&
      infeasible) {
    *infeasible = 1;
  }
}

template <class Format>
__global__ void unpack_kernel(uint8_t const* packed, typename Format::Logical logical) {
  const int64_t panel = blockIdx.x / logical.k_blocks;
  const int64_t k_block = blockIdx.x % logical.k_blocks;
  Format::unpack_row(packed + blockIdx.x * int64_t(Format::kBlockBytes), panel, k_block,
                     Format::row(threadIdx.x), logical);
}

template <class Logical>
dim3 blocks(Logical const& logical) {
  return dim3(static_cast<unsigned>(ceil_div(logical.n, kBlockRows) * logical.k_blocks));
}

template <class Format>
cudaError_t pack(typename Format::Logical const& logical,
                 uint8_t* packed,
                 int* infeasible,
                 cudaStream_t stream) {
  pack_kernel<Format><<<blocks(logical), kBlockRows, 0, stream>>>(logical, packed, infeasible);
  return cudaGetLastError();
}

template <class Format>
cudaError_t unpack(uint8_t const* packed,
                   typename Format::Logical const& logical,
                   cudaStream_t stream) {
  unpack_kernel<Format><<<blocks(logical), kBlockRows, 0, stream>>>(packed, logical);
  return cudaGetLastError();
}

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k_blocks, FormatId format) {
  return ceil_div(n, kBlockRows) * k_blocks * block_bytes(format);
}

cudaError_t pack_weight(LogicalWeight const& logical,
                        uint8_t* packed,
                        int* infeasible,
                        cudaStream_t stream) {
  return pack<LiquidQuant>(logical, packed, infeasible, stream);
}

cudaError_t unpack_weight(uint8_t const* packed,
                          LogicalWeight const& logical,
                          cudaStream_t stream) {
  return unpack<LiquidQuant>(packed, logical, stream);
}

cudaError_t pack_weight(LogicalWeight6 const& logical,
                        uint8_t* packed,
                        int* infeasible,
                        cudaStream_t stream) {
  return pack<LiquidQuant6>(logical, packed, infeasible, stream);
}

cudaError_t unpack_weight(uint8_t const* packed,
                          LogicalWeight6 const& logical,
                          cudaStream_t stream) {
  return unpack<LiquidQuant6>(packed, logical, stream);
}

cudaError_t pack_weight(LogicalWeightG32 const& logical,
                        uint8_t* packed,
                        int* infeasible,
                        cudaStream_t stream) {
  return pack<LiquidQuantG32>(logical, packed, infeasible, stream);
}

cudaError_t unpack_weight(uint8_t const* packed,
                          LogicalWeightG32 const& logical,
                          cudaStream_t stream) {
  return unpack<LiquidQuantG32>(packed, logical, stream);
}

cudaError_t pack_weight(LogicalInt8Weight const& logical, uint8_t* packed, cudaStream_t stream) {
  return pack<Int8>(logical, packed, nullptr, stream);
}

cudaError_t unpack_weight(uint8_t const* packed,
                          LogicalInt8Weight const& logical,
                          cudaStream_t stream) {
  return unpack<Int8>(packed, logical, stream);
}

}  // namespace liquidgemm
