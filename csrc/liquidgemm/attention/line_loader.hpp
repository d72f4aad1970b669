// Copies to shared memory by all lanes of a warp, whole lines of memory at a time: each warp copies
// what it reads itself, so that warps share nothing and wait for none.
#pragma once

#include "liquidgemm/attention/blocks.hpp"
#include "liquidgemm/attention/ptx.hpp"

namespace liquidgemm::attention {

template <class Shape>
class LineLoader : public Blocks<Shape> {
  using Base = Blocks<Shape>;
  using Base::cache_, Base::row_of, Base::lane;

 public:
  CUTE_DEVICE LineLoader(KvCache const& cache, int b, int h, Shared<Shape>& shared)
      : Base(cache, b, h, shared) {}

  CUTE_DEVICE void start(int begin, int end) {
    this->begin(begin, end);
#pragma unroll 1
    for (int i = 0; i < Shape::kSlots; ++i) {
      copy_keys(i);
      copy_values(i);
    }
  }

  // Both commit a group, of nothing where there is no such block. Call copy_keys first, and both
  // once all lanes have read what is copied over.
  CUTE_DEVICE void copy_keys(int block) {
    if (block < this->count()) {
      this->find_rows(block);
      auto& slot = this->slot(block);
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        auto const from =
            static_cast<uint8_t const*>(cache_.k) + row_of(block, half) * Shape::kWidth;
        CUTE_UNROLL
        for (int i = 0; i < Shape::kHalfBytes / (4 * kLine); ++i) {
          const int at = (4 * i + lane() / 8) * kLine + lane() % 8 * 16;
          // Rows of the products are pairs of tokens, see decode_kernel.hpp.
          const int token = at / Shape::kWidth, piece = at % Shape::kWidth / Shape::kKeyPiece;
          copy_16_async(
              shared_address(slot.key(half, token % 2, piece / 4, token / 2 * 4 + piece % 4)),
              from + at);
        }
      }
      copy_params(block);
    }
    commit_copies();
  }

  CUTE_DEVICE void copy_values(int block) {
    if (block < this->count()) {
      auto& slot = this->slot(block);
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int token = lane() / 8 * 4, piece = lane() % 8;  // four tokens
        auto const from = static_cast<uint8_t const*>(cache_.v) +
                          (row_of(block, half) + token) * Shape::kWidth + piece * 16;
        CUTE_UNROLL
        for (int i = 0; i < Shape::kValuePieces; ++i)
          copy_16_async(shared_address(slot.value(half, i, 4 * piece + token / 4)),
                        from + i * kLine);
      }
    }
    commit_copies();
  }

  // For the copies of all lanes of the warp: groups arrive in order.
  CUTE_DEVICE static void wait_for_keys(int) { wait(); }
  CUTE_DEVICE static void wait_for_values(int) { wait(); }
  CUTE_DEVICE static void finish() {}

 private:
  static constexpr int kLine = 128;  // bytes of a line of memory, which eight lanes copy

  CUTE_DEVICE static void wait() {
    wait_copies<2 * Shape::kSlots - 1>();
    __syncwarp();
  }

  // Parameters of keys by the first 16 lanes, of values by the others: of two tokens each.
  CUTE_DEVICE void copy_params(int block) {
    const int half = lane() / 8 % 2;
    const int64_t row = row_of(block, half);
    auto const params =
        static_cast<uint8_t const*>(lane() < 16 ? cache_.k_params : cache_.v_params);
    uint8_t* const to = this->params(block, lane() / 16) + lane() % 16 * Shape::kPairBytes;
    copy_async<Shape::kPairBytes>(shared_address(to), params + row * (Shape::kPairBytes / 2) +
                                                          lane() % 8 * Shape::kPairBytes);
  }
};

}  // namespace liquidgemm::attention
