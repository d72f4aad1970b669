// A weight as checkpoints hold it.
#pragma once

#include <cstdint>

namespace liquidgemm {

// Logical tensors, row-major: qweight [n, k / 2] (column 2j in the low nibble of byte j), qscale
// and qoffset [n, k / 64].
struct LogicalWeight {
  uint8_t* qweight;
  uint8_t* qscale;
  uint8_t* qoffset;
  int64_t n;
  int64_t k_blocks;
};

}  // namespace liquidgemm
