// Decode attention over codes of 8 or 4 bits in integer products.
//
// A CTA works on one chunk of one sequence and one key head after the other, for up to kRows of the
// query rows that share the head: its group of heads, times the query tokens. Its warps take blocks
// of 32 tokens in turn, each for itself, and add up at the end of the chunk. All products are
// mma.m16n8k32 of bytes, whose 8 columns are the two digits of four queries:
//
//            A                                   B                        C
//   scores   keys, 16 tokens x 32 dims           digits of queries        exact; lane (g, t) has
//                                                                         query t, tokens 2g, 2g +
//                                                                         1
//   output   values, 16 dims x 32 tokens         digits of weights        exact; lane (g, t) has
//                                                                         query t
//
// Any order of dimensions will do for the scores as long as keys and queries share it: a lane's
// bytes of a key lie side by side. Row g of the scores' product is token 2g of 16, row g + 8 token
// 2g + 1. So a transposition of 8 x 8 pairs of digits makes B of what C gave, and column 4t ... of
// the values' A is four tokens of one dimension, as they are stored. Zero points of int4 are
// subtracted from the sums.
//
// The partial result of a chunk is a function of that chunk alone; merge.hpp adds them in order.
#pragma once

#include "liquidgemm/attention/bulk_loader.hpp"
#include "liquidgemm/attention/line_loader.hpp"
#include "liquidgemm/attention/merge.hpp"
#include "liquidgemm/attention/queries.hpp"
#include "liquidgemm/attention/token_params.hpp"
#include "liquidgemm/attention/weights.hpp"
#include "liquidgemm/common/grid_dependency.hpp"

namespace liquidgemm::attention {

template <class Shape>
using Loader = std::conditional_t<Shape::kBulk, BulkLoader<Shape>, LineLoader<Shape>>;

template <class Shape>
class Decoder {
 public:
  CUTE_DEVICE Decoder(KvAttentionArguments const& a,
                      int b,
                      int h,
                      int first_row,
                      Chunks const& chunks,
                      Shared<Shape>& shared)
      : a_(a), chunks_(chunks), shared_(shared), loader_(a.cache, b, h, shared) {
    CUTE_UNROLL
    for (int i = 0; i < Shape::kTiles; ++i)
      last_[i] = chunks.length - a.queries + (first_row + 4 * i + t()) / a.group;
    least_last_ = chunks.length - a.queries;
    start_ = first_token(a, b);
    most_first_ = a.window > 0 ? max(start_, chunks.length - a.window) : start_;
  }

  // The copies of a chunk's first blocks, which need no queries.
  CUTE_DEVICE void start(int chunk) {
    end_ = min((chunk + 1) * chunks_.tokens, chunks_.length);
    loader_.start(max(chunk * chunks_.tokens, chunks_.first / Shape::kBlock * Shape::kBlock), end_);
  }

  // Once the queries are prepared.
  CUTE_DEVICE void read_queries() {
    if constexpr (kHoldsQueries) {
      CUTE_UNROLL
      for (int step = 0; step < Shape::kSteps; ++step) {
        CUTE_UNROLL
        for (int i = 0; i < Shape::kTiles; ++i)
          queries_[step][i] = query_fragment(shared_, step, i);
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < Shape::kTiles; ++i) {
      query_scale_[i] = shared_.query_scale[4 * i + t()];
      query_sum_[i] = shared_.query_sum[4 * i + t()];
    }
  }

  CUTE_DEVICE void attend() {
    CUTE_UNROLL
    for (int i = 0; i < Shape::kTiles; ++i) {
      reference_[i] = Reference();
      CUTE_UNROLL
      for (int j = 0; j < Shape::kDimTiles; ++j) {
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r)
          sums_[i][j][r] = 0;
      }
    }
#pragma unroll 1
    for (int block = 0; block < loader_.count(); ++block) {
      loader_.wait_for_keys(block);
      int dots[Shape::kTiles][2][4] = {};
      multiply_keys(loader_.slot(block), dots);
      const TokenParams<Shape> keys(loader_.params(block, false));
      const TokenParams<Shape> values(loader_.params(block, true));
      __syncwarp();  // all lanes have read
      loader_.copy_keys(block + Shape::kSlots);
      uint32_t digits[Shape::kTiles][2];
      const int token = loader_.token(block);
      const bool whole = token >= most_first_ && token + Shape::kBlock - 1 <= least_last_ &&
                         token + Shape::kBlock <= end_;
      CUTE_UNROLL
      for (int i = 0; i < Shape::kTiles; ++i)
        weigh_tokens(i, token, whole, dots[i], keys, values, digits[i]);
      loader_.wait_for_values(block);
      multiply_values(loader_.slot(block), digits);
      __syncwarp();
      loader_.copy_values(block + Shape::kSlots);
    }
    loader_.finish();
  }

  // The sum of all warps, of `rows` rows.
  CUTE_DEVICE void store(float* partial, float2* stats, int rows) {
    const int warp = threadIdx.x / 32;
    CUTE_UNROLL
    for (int i = 0; i < Shape::kTiles; ++i) {
      CUTE_UNROLL
      for (int stride = 4; stride < 32; stride *= 2) {
        reference_[i].total += __shfl_xor_sync(kAllLanes, reference_[i].total, stride);
        if constexpr (Shape::kInt4)
          reference_[i].zeros += __shfl_xor_sync(kAllLanes, reference_[i].zeros, stride);
      }
      if (g() == 0) {
        shared_.most[warp][4 * i + t()] = reference_[i].most;
        shared_.total[warp][4 * i + t()] = reference_[i].total;
      }
    }
    __syncthreads();  // from here on, no warp reads a slot
    CUTE_UNROLL
    for (int i = 0; i < Shape::kTiles; ++i)
      scatter(i, shared_.sums[warp][4 * i + t()]);
    __syncthreads();
    for (int at = threadIdx.x; at < Shape::kRows * Shape::kHeadDim; at += Shape::kThreads) {
      const int row = at / Shape::kHeadDim, d = at % Shape::kHeadDim;
      if (row >= rows)
        break;
      float sum = 0;
      CUTE_UNROLL
      for (int w = 0; w < Shape::kWarps; ++w)
        sum += shared_.sums[w][row][d];
      partial[at] = sum;
    }
    const int row = threadIdx.x;
    if (row < Shape::kRows && row < rows) {
      const float most = most_of(row);
      float total = 0;
      CUTE_UNROLL
      for (int w = 0; w < Shape::kWarps; ++w)
        total += shared_.total[w][row] * exp2_approximate(shared_.most[w][row] - most);
      stats[row] = make_float2(most, total);
    }
  }

 private:
  static constexpr bool kHoldsQueries = Shape::kTiles * Shape::kHeadDim <= 256;

  CUTE_DEVICE static int g() { return threadIdx.x % 32 / 4; }
  CUTE_DEVICE static int t() { return threadIdx.x % 4; }

  CUTE_DEVICE void multiply_keys(Slot<Shape> const& slot, int (&dots)[Shape::kTiles][2][4]) {
    constexpr int kPairs = Shape::kKeyPiece / 8;
    const int lane = threadIdx.x % 32;
    CUTE_UNROLL
    for (int piece = 0; piece < Shape::kKeyPieces; ++piece) {
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        CUTE_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
          const uint2 even = reinterpret_cast<uint2 const*>(slot.key(half, 0, piece, lane))[pair];
          const uint2 odd = reinterpret_cast<uint2 const*>(slot.key(half, 1, piece, lane))[pair];
          const uint32_t a[4] = {even.x, odd.x, even.y, odd.y};
          const int step = piece * kPairs + pair;
          if constexpr (Shape::kInt4) {
            uint32_t low[4], high[4];
            CUTE_UNROLL
            for (int i = 0; i < 4; ++i) {
              low[i] = a[i] & 0x0f0f0f0fu;
              high[i] = a[i] >> 4 & 0x0f0f0f0fu;
            }
            multiply_step(step, half, low, dots);
            multiply_step(Shape::kSteps / 2 + step, half, high, dots);
          } else {
            multiply_step(step, half, a, dots);
          }
        }
      }
    }
  }

  CUTE_DEVICE void multiply_step(int step,
                                 int half,
                                 uint32_t const (&a)[4],
                                 int (&dots)[Shape::kTiles][2][4]) {
    CUTE_UNROLL
    for (int i = 0; i < Shape::kTiles; ++i) {
      uint2 b;
      if constexpr (kHoldsQueries)
        b = queries_[step][i];
      else
        b = query_fragment(shared_, step, i);
      mma<!Shape::kInt4, true>(dots[i][half], a, b.x, b.y);
    }
  }

  CUTE_DEVICE void weigh_tokens(int i,
                                int block,
                                bool whole,
                                int const (&dots)[2][4],
                                TokenParams<Shape> const& keys,
                                TokenParams<Shape> const& values,
                                uint32_t (&digits)[2]) {
    Reference& reference = reference_[i];
    float score[4], value_scale[4];
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      int dot = dots[j / 2][j % 2 * 2] * 256 + dots[j / 2][j % 2 * 2 + 1];
      if constexpr (Shape::kInt4)
        dot -= keys.zero[j] * query_sum_[i];
      score[j] = static_cast<float>(dot) * (keys.scale[j] * query_scale_[i]);
      value_scale[j] = values.scale[j];
    }
    if (a_.softcap > 0)
      cap(score);
    if (!whole) {
      const int first = a_.window > 0 ? max(start_, last_[i] - a_.window + 1) : start_;
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int token = block + j / 2 * Shape::kHalf + 2 * g() + j % 2;
        const bool seen = token >= first && token <= last_[i] && token < end_;
        score[j] = seen ? score[j] : -INFINITY;
        value_scale[j] = seen ? value_scale[j] : 0.f;  // past the end it may be a NaN
      }
    }
    float p[4], weight[4];
    weigh(reference, score, value_scale, p, weight);
    bool asks = leaves_range(p, weight);
    if (__any_sync(kAllLanes, asks)) {
      raise(reference, asks, score, value_scale, sums_[i]);
      weigh(reference, score, value_scale, p, weight);
    }
    reference.total += p[0] + p[1] + (p[2] + p[3]);
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      reference.total = fmaf(value_scale[j], 0.f, reference.total);  // a NaN is one of the result
      if constexpr (Shape::kInt4)
        reference.zeros += (__float_as_uint(weight[j]) & 0xffff) * values.zero[j];
    }
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      // The high digits of both tokens, then the low ones.
      digits[half] = transpose_8x8(__byte_perm(__float_as_uint(weight[2 * half]),
                                               __float_as_uint(weight[2 * half + 1]), 0x4051));
    }
  }

  // cap * tanh(score / cap), in units of log2(e).
  CUTE_DEVICE void cap(float (&score)[4]) const {
    const float inside = 2.f / a_.softcap;
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j)
      score[j] =
          a_.softcap * kLog2E * (1.f - __fdividef(2.f, exp2_approximate(score[j] * inside) + 1.f));
  }

  CUTE_DEVICE void multiply_values(Slot<Shape> const& slot,
                                   uint32_t const (&digits)[Shape::kTiles][2]) {
    const int lane = threadIdx.x % 32;
    CUTE_UNROLL
    for (int piece = 0; piece < Shape::kValuePieces; ++piece) {
      const uint4 first = *reinterpret_cast<uint4 const*>(slot.value(0, piece, lane));
      const uint4 second = *reinterpret_cast<uint4 const*>(slot.value(1, piece, lane));
      const uint32_t a[2][4] = {{first.x, first.y, second.x, second.y},
                                {first.z, first.w, second.z, second.w}};
      CUTE_UNROLL
      for (int j = 0; j < 2; ++j) {
        uint32_t low[4], high[4];
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) {
          low[r] = Shape::kInt4 ? a[j][r] & 0x0f0f0f0fu : a[j][r];
          high[r] = a[j][r] & 0xf0f0f0f0u;  // 16 times the code
        }
        CUTE_UNROLL
        for (int i = 0; i < Shape::kTiles; ++i) {
          mma<!Shape::kInt4, false>(sums_[i][2 * piece + j], low, digits[i][0], digits[i][1]);
          if constexpr (Shape::kInt4)
            mma<false, false>(sums_[i][Shape::kDimTiles / 2 + 2 * piece + j], high, digits[i][0],
                              digits[i][1]);
        }
      }
    }
  }

  CUTE_DEVICE float most_of(int row) const {
    float most = shared_.most[0][row];
    CUTE_UNROLL
    for (int w = 1; w < Shape::kWarps; ++w)
      most = fmaxf(most, shared_.most[w][row]);
    return most;
  }

  // This warp's sums of tile i, relative to 2^(most of all warps).
  CUTE_DEVICE void scatter(int i, float (&row)[Shape::kHeadDim]) const {
    const float unit = exp2_approximate(reference_[i].unit - most_of(4 * i + t()));
    const float zeros = static_cast<float>(reference_[i].zeros);
    CUTE_UNROLL
    for (int j = 0; j < Shape::kDimTiles; ++j) {
      constexpr int kTilesOfWidth = Shape::kWidth / 16;
      const bool is_high = j >= kTilesOfWidth;  // nibbles
      float value[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        value[r] = fmaf(static_cast<float>(sums_[i][j][2 * r]), 256.f,
                        static_cast<float>(sums_[i][j][2 * r + 1]));
        if constexpr (Shape::kInt4)
          value[r] = value[r] * (is_high ? 1 / 16.f : 1.f) - zeros;
        value[r] *= unit;
      }
      const int at = j % kTilesOfWidth;
      const int d = at / 2 * 32 + 4 * g() + at % 2 * 2 + (is_high ? Shape::kWidth : 0);
      *reinterpret_cast<float2*>(&row[d]) = make_float2(value[0], value[1]);
    }
  }

  KvAttentionArguments const& a_;
  Chunks const& chunks_;
  Shared<Shape>& shared_;
  Loader<Shape> loader_;
  int end_ = 0;                  // of the chunk
  int start_;                    // the first token that is no padding
  int last_[Shape::kTiles];      // token that this lane's queries see; may lie past the end
  int least_last_, most_first_;  // what all queries see lies between
  uint2 queries_[kHoldsQueries ? Shape::kSteps : 1][Shape::kTiles];
  float query_scale_[Shape::kTiles];
  int query_sum_[Shape::kTiles];
  Reference reference_[Shape::kTiles];
  int sums_[Shape::kTiles][Shape::kDimTiles][4];
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtas)
    decode_kernel(const __grid_constant__ KvAttentionArguments a, int max_chunks, int row_groups) {
  extern __shared__ __align__(16) uint8_t bytes[];
  auto& shared = *reinterpret_cast<Shared<Shape>*>(bytes);
  wait_on_dependent_grids();
  launch_dependent_grids();  // which may read what came before this kernel
  const int b = blockIdx.y, h = blockIdx.x / row_groups;
  const int first_row = blockIdx.x % row_groups * Shape::kRows;
  const int rows = a.queries * a.group, own_rows = min(rows - first_row, Shape::kRows);
  const Chunks chunks = chunks_of<Shape>(a, b);
  const int first = chunks.begin + blockIdx.z, ctas = gridDim.z;
  const bool finishes = chunks.end - chunks.begin <= 1;  // what combine.cu does for the others
  if (first >= chunks.end && !(finishes && blockIdx.z == 0))
    return;
  const int64_t place = (static_cast<int64_t>(b) * a.cache.heads + h) * max_chunks;
  Decoder<Shape> decoder(a, b, h, first_row, chunks, shared);
#pragma unroll 1
  for (int chunk = first; chunk < chunks.end; chunk += ctas) {
    decoder.start(chunk);
    if (chunk == first) {  // while the first copies are under way
      prepare_queries<Shape>(a, b, h, first_row, shared);
      __syncthreads();
      decoder.read_queries();
    }
    decoder.attend();
    const int64_t row = (place + chunk) * rows + first_row;
    if (finishes)
      decoder.store(shared.partial[0], shared.stats, own_rows);
    else
      decoder.store(a.partial + row * Shape::kHeadDim, a.stats + row, own_rows);
    if constexpr (Shape::kBulk)
      cutlass::arch::fence_view_async_shared();  // bulk copies come after what is written here
    __syncthreads();                             // before slots are copied to again
  }
  if (!finishes)
    return;
  for (int row = threadIdx.x / 32; row < own_rows; row += Shape::kWarps)
    merge_row<Shape>(
        a, b, h, first_row + row, chunks, [&](int) { return shared.partial[row]; },
        [&](int) { return shared.stats + row; });
}

}  // namespace liquidgemm::attention
