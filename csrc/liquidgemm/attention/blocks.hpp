// The blocks that one warp works on: which tokens they hold, and where their rows lie.
#pragma once

#include "liquidgemm/attention/rows.hpp"
#include "liquidgemm/attention/shared.hpp"

namespace liquidgemm::attention {

// The blocks of one warp in a chunk: every kWarps-th one, each in the slot of its index.
template <class Shape>
class Blocks {
 public:
  CUTE_DEVICE int count() const { return count_; }
  CUTE_DEVICE int token(int block) const { return begin_ + block * Shape::kWarps * Shape::kBlock; }

  CUTE_DEVICE Slot<Shape>& slot(int block) const {
    return shared_.slots[threadIdx.x / 32][block % Shape::kSlots];
  }
  CUTE_DEVICE uint8_t* params(int block, bool of_values) const {
    return shared_.params[threadIdx.x / 32][block % Shape::kSlots][of_values];
  }

 protected:
  CUTE_DEVICE Blocks(KvCache const& cache, int b, int h, Shared<Shape>& shared)
      : cache_(cache), shared_(shared), b_(b), h_(h) {}

  CUTE_DEVICE static int lane() { return threadIdx.x % 32; }

  CUTE_DEVICE void begin(int begin, int end) {
    begin_ = begin + threadIdx.x / 32 * Shape::kBlock;
    end_ = end;
    count_ = begin_ < end ? (end - begin_ + Shape::kWarps * Shape::kBlock - 1) /
                                (Shape::kWarps * Shape::kBlock)
                          : 0;
  }

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

  KvCache const& cache_;
  Shared<Shape>& shared_;

 private:
  static constexpr int kKnown = 16;  // blocks whose rows the lanes of a warp know

  int b_, h_;
  int begin_ = 0, end_ = 0, count_ = 0;
  int64_t row_ = 0;
};

}  // namespace liquidgemm::attention
