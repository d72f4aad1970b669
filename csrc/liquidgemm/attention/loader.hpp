// Copies of codes and parameters to shared memory: each warp copies what it reads itself, whole
// lines of memory at a time, so that warps share nothing and wait for none.
#pragma once

#include "liquidgemm/attention/ptx.hpp"
#include "liquidgemm/attention/rows.hpp"
#include "liquidgemm/attention/shape.hpp"

namespace liquidgemm::attention {

// The blocks of one warp in a chunk: every kWarps-th one, each in the slot of its index.
template <class Shape>
class Loader {
 public:
  CUTE_DEVICE Loader(KvCache const& cache, int b, int h, Shared<Shape>& shared)
      : cache_(cache), b_(b), h_(h), shared_(shared) {}

  CUTE_DEVICE void start(int begin, int end) {
    begin_ = begin + threadIdx.x / 32 * Shape::kBlock;
    end_ = end;
    count_ = begin_ < end ? (end - begin_ + Shape::kWarps * Shape::kBlock - 1) /
                                (Shape::kWarps * Shape::kBlock)
                          : 0;
#pragma unroll 1
    for (int i = 0; i < Shape::kSlots; ++i) {
      copy_keys(i);
      copy_values(i);
    }
  }

  CUTE_DEVICE int count() const { return count_; }
  CUTE_DEVICE int token(int block) const { return begin_ + block * Shape::kWarps * Shape::kBlock; }

  // Both commit a group, of nothing where there is no such block. Call copy_keys first, and both
  // once all lanes have read what is copied over.
  CUTE_DEVICE void copy_keys(int block) {
    if (block < count_) {
      find_rows(block);
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
    if (block < count_) {
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

  // For the copies of all lanes of the warp.
  CUTE_DEVICE static void wait() {
    wait_copies<2 * Shape::kSlots - 1>();
    __syncwarp();
  }

  CUTE_DEVICE Slot<Shape>& slot(int block) const {
    return shared_.slots[threadIdx.x / 32][block % Shape::kSlots];
  }
  CUTE_DEVICE uint8_t const* params(int block, bool of_values) const {
    return shared_.params[threadIdx.x / 32][block % Shape::kSlots][of_values];
  }

 private:
  static constexpr int kLine = 128;  // bytes of a line of memory, which eight lanes copy
  static constexpr int kKnown = 16;  // blocks whose rows the lanes of a warp know

  CUTE_DEVICE static int lane() { return threadIdx.x % 32; }
  // Lane 2 * i + half looks up that half of the i-th block from here on. Past the end it is the
  // last half again: what is copied there is not used, but may be read.
  CUTE_DEVICE void find_rows(int block) {
    if (block % kKnown != 0)
      return;
    const int token = this->token(block + lane() / 2) + lane() % 2 * Shape::kHalf;
    row_ = cache_row(cache_, b_, h_, min(token, (end_ - 1) / Shape::kHalf * Shape::kHalf));
  }
  CUTE_DEVICE int64_t row_of(int block, int half) const {
    return __shfl_sync(kAllLanes, row_, block % kKnown * 2 + half);
  }

  // Parameters of keys by the first 16 lanes, of values by the others: of two tokens each.
  CUTE_DEVICE void copy_params(int block) {
    const int half = lane() / 8 % 2;
    const int64_t row = row_of(block, half);
    auto const params =
        static_cast<uint8_t const*>(lane() < 16 ? cache_.k_params : cache_.v_params);
    uint8_t* const to = shared_.params[threadIdx.x / 32][block % Shape::kSlots][lane() / 16] +
                        lane() % 16 * Shape::kPairBytes;
    copy_async<Shape::kPairBytes>(shared_address(to), params + row * (Shape::kPairBytes / 2) +
                                                          lane() % 8 * Shape::kPairBytes);
  }

  KvCache const& cache_;
  int b_, h_;
  Shared<Shape>& shared_;
  int begin_ = 0, end_ = 0, count_ = 0;
  int64_t row_ = 0;
};

}  // namespace liquidgemm::attention
