// Bulk copies to shared memory, half a block each: each warp copies what it reads itself and counts
// the bytes at barriers of its own, so that warps share nothing and wait for none.
#pragma once

#include <cutlass/arch/barrier.h>

#include "liquidgemm/attention/blocks.hpp"
#include "liquidgemm/attention/ptx.hpp"

namespace liquidgemm::attention {

template <class Shape>
class BulkLoader : public Blocks<Shape> {
  using Base = Blocks<Shape>;
  using Base::cache_, Base::row_of, Base::lane;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;

 public:
  CUTE_DEVICE BulkLoader(KvCache const& cache, int b, int h, Shared<Shape>& shared)
      : Base(cache, b, h, shared) {}

  CUTE_DEVICE void start(int begin, int end) {
    this->begin(begin, end);
    if (lane() == 0) {
      CUTE_UNROLL
      for (int i = 0; i < 2 * Shape::kSlots; ++i)
        Barrier::init(barrier_of(i / 2, i % 2), 1);
      cutlass::arch::fence_barrier_init();
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < Shape::kSlots; ++i) {
      copy_keys(i);
      copy_values(i);
    }
  }

  // Keys and all parameters of a block, if there is such a one. Call copy_keys first, and both once
  // all lanes have read what is copied over.
  CUTE_DEVICE void copy_keys(int block) {
    if (block >= this->count())
      return;
    this->find_rows(block);
    const int half = lane() % 2, what = lane() / 2;  // keys, their parameters, those of values
    const int64_t row = row_of(block, half);
    uint64_t* const arrived = expect(block, false, 2 * (Shape::kHalfBytes + Shape::kParamBytes));
    if (what == 0)
      copy_bulk(this->slot(block).keys[half],
                static_cast<uint8_t const*>(cache_.k) + row * Shape::kWidth, Shape::kHalfBytes,
                arrived);
    constexpr int kBytes = Shape::kParamBytes / 2;
    auto const params = static_cast<uint8_t const*>(what == 1 ? cache_.k_params : cache_.v_params);
    if (what == 1 || what == 2)
      copy_bulk(this->params(block, what == 2) + half * kBytes,
                params + row * (Shape::kPairBytes / 2), kBytes, arrived);
  }

  CUTE_DEVICE void copy_values(int block) {
    if (block >= this->count())
      return;
    const int half = lane() % 2;
    const int64_t row = row_of(block, half);
    uint64_t* const arrived = expect(block, true, 2 * Shape::kHalfBytes);
    if (lane() < 2)
      copy_bulk(this->slot(block).values[half],
                static_cast<uint8_t const*>(cache_.v) + row * Shape::kWidth, Shape::kHalfBytes,
                arrived);
  }

  // Barriers begin anew with every chunk, so that their parity follows from the block.
  CUTE_DEVICE void wait_for_keys(int block) const { wait(block, false); }
  CUTE_DEVICE void wait_for_values(int block) const { wait(block, true); }

  // Once all is waited for and read. What the CTA writes over the slots then, it writes before the
  // bulk copies of its next chunk.
  CUTE_DEVICE void finish() {
    __syncwarp();
    if (lane() == 0) {
      CUTE_UNROLL
      for (int i = 0; i < 2 * Shape::kSlots; ++i)
        Barrier::invalidate(barrier_of(i / 2, i % 2));
    }
  }

 private:
  CUTE_DEVICE uint64_t* barrier_of(int block, bool of_values) const {
    return &this->shared_.arrived.barriers[threadIdx.x / 32][block % Shape::kSlots][of_values];
  }
  CUTE_DEVICE uint64_t* expect(int block, bool of_values, int bytes) {
    uint64_t* const arrived = barrier_of(block, of_values);
    if (lane() == 0)
      Barrier::arrive_and_expect_tx(arrived, bytes);
    __syncwarp();
    return arrived;
  }
  CUTE_DEVICE void wait(int block, bool of_values) const {
    Barrier::wait(barrier_of(block, of_values), block / Shape::kSlots % 2);
  }
};

}  // namespace liquidgemm::attention
