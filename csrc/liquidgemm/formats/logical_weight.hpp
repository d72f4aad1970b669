// A weight as checkpoints hold it.
#pragma once

#include <cstdint>

namespace liquidgemm {

// Of LiquidQuant, row-major: qweight [n, k / 2] (column 2j in the low nibble of byte j), qscale
// and qoffset [n, k / 64].
struct LogicalWeight {
  uint8_t* qweight;
  uint8_t* qscale;
  uint8_t* qoffset;
  int64_t n;
  int64_t k_blocks;
};

// Of LiquidQuant6, likewise: qweight [n, 3 k / 4], a row's codes one after the other in its bits,
// from the lowest ones of the first byte on.
struct LogicalWeight6 : LogicalWeight {};

// Of LiquidQuantG32, likewise: qscale and qoffset [n, k / 32].
struct LogicalWeightG32 : LogicalWeight {};

// Of INT8, row-major: qweight [n, k].
struct LogicalInt8Weight {
  int8_t* qweight;
  int64_t n;
  int64_t k_blocks;
};

}  // namespace liquidgemm
