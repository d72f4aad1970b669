// Weights from the logical layout to the one that the kernels read, and back, on the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "liquidgemm/formats/format_id.hpp"
#include "liquidgemm/formats/logical_weight.hpp"

namespace liquidgemm {

// Of a packed weight of n channels: [ceil(n / 64), k_blocks] blocks of 64 x 64.
int64_t packed_bytes(int64_t n, int64_t k_blocks, FormatId format = FormatId::kLiquidQuant);

// Enqueues the packing; rows past n decode to 0. *infeasible, in device memory and zeroed by the
// caller, becomes 1 if some code * step + offset exceeds 255. Returns what the launch returns.
cudaError_t pack_weight(LogicalWeight const& logical,
                        uint8_t* packed,
                        int* infeasible,
                        cudaStream_t stream);

// The exact inverse.
cudaError_t unpack_weight(uint8_t const* packed, LogicalWeight const& logical, cudaStream_t stream);

// The same of 6-bit codes.
cudaError_t pack_weight(LogicalWeight6 const& logical,
                        uint8_t* packed,
                        int* infeasible,
                        cudaStream_t stream);
cudaError_t unpack_weight(uint8_t const* packed,
                          LogicalWeight6 const& logical,
                          cudaStream_t stream);

// And of groups of 32.
cudaError_t pack_weight(LogicalWeightG32 const& logical,
                        uint8_t* packed,
                        int* infeasible,
                        cudaStream_t stream);
cudaError_t unpack_weight(uint8_t const* packed,
                          LogicalWeightG32 const& logical,
                          cudaStream_t stream);

// The same of INT8 weights, all of which are representable: a problem's format says which ones.
cudaError_t pack_weight(LogicalInt8Weight const& logical, uint8_t* packed, cudaStream_t stream);
cudaError_t unpack_weight(uint8_t const* packed,
                          LogicalInt8Weight const& logical,
                          cudaStream_t stream);

}  // namespace liquidgemm
