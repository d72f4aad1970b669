// The shared memory of a CTA of the decode kernel.
#pragma once

#include <type_traits>

#include "liquidgemm/attention/shape.hpp"

namespace liquidgemm::attention {

// 32 tokens' codes, which one warp copies, waits for and reads.
//
// Lanes have places of their own, permuted so that those who copy one line of memory write to
// different banks.
template <class Shape>
struct alignas(16) LineSlot {
  // Of token 2g or, if `odd`, 2g + 1, for lane (g, t).
  __device__ uint8_t* key(int half, int odd, int piece, int lane) {
    const int flip = Shape::kKeyPiece < 16 ? 0 : Shape::kKeyPieces > 1 ? piece % 2 : odd;
    return keys_[half][odd][piece][lane ^ 4 * flip];
  }
  __device__ uint8_t const* key(int half, int odd, int piece, int lane) const {
    return const_cast<LineSlot*>(this)->key(half, odd, piece, lane);
  }

  // Of tokens 4t to 4t + 3.
  __device__ uint8_t* value(int half, int piece, int lane) {
    return values_[half][piece][lane ^ lane >> 3];
  }
  __device__ uint8_t const* value(int half, int piece, int lane) const {
    return const_cast<LineSlot*>(this)->value(half, piece, lane);
  }

 private:
  uint8_t keys_[2][2][Shape::kKeyPieces][32][Shape::kKeyPiece];
  uint8_t values_[2][Shape::kValuePieces][32][16];
};

// The same codes as they lie in memory. Lanes that read keys meet in a bank in pairs, those that
// read values in fours.
template <class Shape>
struct alignas(16) BulkSlot {
  uint8_t keys[2][Shape::kHalfBytes];  // by half
  uint8_t values[2][Shape::kHalfBytes];

  __device__ uint8_t const* key(int half, int odd, int piece, int lane) const {
    return keys[half] + (lane / 4 * 2 + odd) * Shape::kWidth +
           (piece * 4 + lane % 4) * Shape::kKeyPiece;
  }
  __device__ uint8_t const* value(int half, int piece, int lane) const {
    return values[half] + lane % 4 * 4 * Shape::kWidth + piece * 128 + lane / 4 * 16;
  }
};

template <class Shape>
using Slot = std::conditional_t<Shape::kBulk, BulkSlot<Shape>, LineSlot<Shape>>;

// Barriers at which the bytes of bulk copies are counted.
template <class Shape, bool kBulk = Shape::kBulk>
struct Arrived {};

template <class Shape>
struct Arrived<Shape, true> {
  uint64_t barriers[Shape::kWarps][Shape::kSlots][2];  // keys and all parameters, values
};

template <class Shape>
struct Shared {
  union {
    Slot<Shape> slots[Shape::kWarps][Shape::kSlots];
    struct {  // once all slots are read
      float sums[Shape::kWarps][Shape::kRows][Shape::kHeadDim];
      float partial[Shape::kRows][Shape::kHeadDim];
    };
  };
  float2 stats[Shape::kRows];
  [[no_unique_address]] Arrived<Shape> arrived;
  alignas(16) uint8_t params[Shape::kWarps][Shape::kSlots][2][Shape::kParamBytes];
  alignas(16) uint8_t digits[Shape::kRows][2][Shape::kQueryPitch];  // of the queries: high, low
  float query_scale[Shape::kRows];
  int query_sum[Shape::kRows];
  float most[Shape::kWarps][Shape::kRows];
  float total[Shape::kWarps][Shape::kRows];
};

}  // namespace liquidgemm::attention
