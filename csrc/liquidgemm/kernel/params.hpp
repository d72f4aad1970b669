// What the host hands to the kernel: a struct for each role, and what several roles need.
#pragma once

#include <cuda.h>

#include <cstdint>

#include <cute/config.hpp>

#include "liquidgemm/common/element.hpp"

namespace liquidgemm {

// Not among the parameters of the roles: the alignment of a tensor map would pad each of them.
struct TensorMaps {
  CUtensorMap
      tokens;  // int8 [m, k]: boxes of the tiles' height (in pairs half of it) x 128 k,
               // 128-byte swizzle, zero fill past the edges. Unused if the kernel quantizes.
  CUtensorMap output;  // y of 16 bits: boxes of store_tokens x 64 channels, 128-byte swizzle. Used
                       // if rows_are_vectors and Tile::kStoresByTma.
};

struct WeightParams {
  uint8_t const* packed;  // [panels, k_blocks, Format::kBlockBytes]
};

struct Sizes {
  int m, n;              // of y
  int panels, k_blocks;  // of the weight: n and k in blocks, rounded up
};

struct OutputParams {
  float const* x_scale;       // [m]; unused if the kernel quantizes
  float const* weight_scale;  // [n]
  void const* bias;           // [n] or null
  void* y;                    // [m, n], row stride y_stride elements
  int64_t y_stride;
  Element bias_type;
  Element y_type;  // kInt32: the raw sums, scales and bias ignored

  // Whether every row of y is a whole number of aligned 16-byte vectors, for elements of 2 bytes.
  CUTE_HOST_DEVICE bool rows_are_vectors(Sizes const& sizes) const {
    return (reinterpret_cast<uintptr_t>(y) | (y_stride * 2) | (sizes.n * 2)) % 16 == 0;
  }
};

// The CTAs of a cluster either share every tile along K, or are a pair: see schedule/dense.hpp.
struct ClusterParams {
  int log2_split;
  bool pairs;

  CUTE_HOST_DEVICE int split_k() const { return 1 << log2_split; }
  CUTE_HOST_DEVICE int size() const { return pairs ? 2 : split_k(); }
};

// How many weights are requested and dequantized before the tokens arrive: see plan/rules.hpp.
struct PrefetchParams {
  int eighths_ahead;  // of the ring, requested before the first tokens arrive
  int stages_ahead;  // of each k group, dequantized before; at most Tile::kStagesAhead, and no more
                     // than every CTA's first tile has
};

struct TokenParams {
  void const* source;  // if the kernel quantizes: dense [m, k], elements of 16 bits
  int k;
};

// Work: what the scheduler needs, such as DenseWork. Work::Scheduler<Tile> is the scheduler, and
// Work::cluster are the ClusterParams.
//
// The order lets the compiler load neighbouring members at once, aligned to 16 bytes.
template <class Work>
struct KernelParams {
  TensorMaps maps;
  WeightParams weights;
  OutputParams output;
  Sizes sizes;
  Work work;
  PrefetchParams prefetch;
  TokenParams tokens;
};

}  // namespace liquidgemm
