// What a weight format is. A format is one header beside this one, with a class that satisfies
// WeightFormat; nothing else knows where a bit lies. All formats decode to int8 and share the
// blocks of block_layout.hpp; their blocks differ in size and in what is in them.
//
// How to add one: CONTRIBUTING.md.
#pragma once

#include <concepts>
#include <cstdint>

#include "liquidgemm/formats/block_layout.hpp"

namespace liquidgemm {

// Registers that dequantize() writes: one block's A operand, (4 registers, 1, 2 k steps), each of
// four int8. On the host, for tests; the kernel passes a CuTe tensor.
struct BlockOperand {
  uint32_t registers[2][4];
  CUTE_HOST_DEVICE uint32_t& operator()(int r, int, int step) { return registers[step][r]; }
};

template <class F>
concept WeightFormat = requires(typename F::Logical const& logical,
                                typename F::Row const& row,
                                typename F::Fragment const& fragment,
                                uint8_t* block,
                                uint8_t const* packed,
                                int64_t index,
                                BlockOperand& operand) {
  // Of 64 channels x 64 k: all that the kernel loads of a weight, by bulk copies.
  requires F::kBlockBytes > 0 && F::kBlockBytes % 16 == 0;

  // A thread's part of a block, on its way from memory to the tensor cores.
  { F::fragment(packed, int{}) } -> std::same_as<typename F::Fragment>;  // block, thread
  { F::dequantize(fragment, operand) };

  // The same in a pipeline: Reader(first block in shared memory, thread), then load(bytes from
  // there).
  typename F::Reader;

  // Logical tensors <-> blocks, a row of a block at a time. pack_row returns whether every weight
  // is representable.
  { F::row(int{}) } -> std::same_as<typename F::Row>;
  { F::pack_row(logical, index, index, row, block) } -> std::same_as<bool>;
  { F::unpack_row(packed, index, index, row, logical) };
};

}  // namespace liquidgemm
