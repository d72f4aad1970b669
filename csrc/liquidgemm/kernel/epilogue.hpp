// The epilogue: int32 partial sums -> y[m, n] = float(sum) * x_scale[m] * weight_scale[n] (+
// bias[n]), rounded after each operation, left to right.
//
// The accumulators hold Y transposed: for every octet of tokens a thread has two tokens of two
// channels, four words. Sums that others have parts of are completed first, see partial_sums.hpp.
// Then there are three ways to y:
//
//   store_rows     results of 16 bits: transposed by stmatrix, a chunk of tokens at a time, stored
//                  by TMA or so that eight threads write the 64 channels of a token
//   store_columns  those of groups that took turns: transposed in registers, an octet at a time
//   store_octet    other types and alignments: by element
//
// At few tokens all of this is latency, and each instruction counts: a tile runs it once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>

#include "liquidgemm/common/cluster_ptx.hpp"
#include "liquidgemm/common/element.hpp"
#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/partial_sums.hpp"
#include "liquidgemm/kernel/reduce/pair.hpp"
#include "liquidgemm/kernel/schedule/work_item.hpp"
#include "liquidgemm/kernel/storage.hpp"
#include "liquidgemm/kernel/store/formula.hpp"

namespace liquidgemm {

template <class Tile>
class Epilogue {
 protected:
  using Sums = PartialSums<Tile>;
  static constexpr int kThreads = Sums::kThreads;
  static constexpr int kScalesPerThread = (Tile::kTokens + kThreads - 1) / kThreads;

 public:
  CUTE_DEVICE Epilogue(Sizes const& sizes,
                       OutputParams const& params,
                       CUtensorMap const& map,
                       ClusterParams const& cluster,
                       SharedStorage<Tile>& shared,
                       int panel)
      : sizes_(sizes),
        params_(params),
        map_(map),
        cluster_(cluster),
        shared_(shared),
        panel_(panel) {}

  // Nobody uses this CTA's staging any more, it may exit.
  CUTE_DEVICE void finish() const {
    if (Tile::kStoresByTma && thread() == 0)
      cute::tma_store_wait<0>();
  }

  // Requests what does not depend on the sums, to arrive under the main loop.
  CUTE_DEVICE void prefetch(WorkItem const& work, Place const& place) {
    locate(work, place);
    // One register each: the first 64 threads carry the channels' scales, the next 64 their biases.
    const int channel = first_channel_ + thread() % kBlockRows;
    channel_value_ = -0.f;  // the bias that changes no bit of what it is added to
    if (channel < sizes_.n && thread() < kBlockRows) {
      channel_value_ = params_.weight_scale[place.scale_offset + channel];
    } else if (channel < sizes_.n && thread() < 2 * kBlockRows && params_.bias) {
      channel_value_ = load_as_float(params_.bias, params_.bias_type, place.scale_offset + channel);
    }
    CUTE_UNROLL
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int token = thread() + i * kThreads;
      if constexpr (Tile::kQuantizes) {
        token_scale_[i] = token < tokens_ ? shared_.quantized_scale[token] : 0.f;
      } else {
        token_scale_[i] = token < tokens_ ? params_.x_scale[first_token_ + token] : 0.f;
      }
    }
  }

  template <class Scheduler, class Accumulator>
  CUTE_DEVICE void store(Scheduler const& scheduler, Accumulator& acc, int k_group) {
    begin_store(scheduler);
    // How y is stored is asked where it is branched upon: kept in a variable across the barriers,
    // it made ptxas take the whole role for divergent, down to the descriptors of the main loop.
    if constexpr (!Tile::kPairs) {
      const auto sums_of_group = sums().complete(scheduler.item(), acc, k_group);
      if (params_.rows_are_vectors(sizes_) && params_.y_type == Element::kBFloat16) {
        store_columns<__nv_bfloat162>(sums_of_group, k_group);
      } else if (params_.rows_are_vectors(sizes_) && params_.y_type == Element::kFloat16) {
        store_columns<__half2>(sums_of_group, k_group);
      } else {
        store_turns(sums_of_group, k_group);
      }
      sums().release(scheduler.is_last());
    } else {
      if (split())
        exchange_in_pair(shared_, panel_, ownership_, tokens_, acc);
      panel_barrier();  // the scales
      if (params_.rows_are_vectors(sizes_) && params_.y_type == Element::kBFloat16) {
        store_rows<__nv_bfloat162>(acc);
      } else if (params_.rows_are_vectors(sizes_) && params_.y_type == Element::kFloat16) {
        store_rows<__half2>(acc);
      } else {
        store_octets(acc);
      }
    }
  }

 protected:
  template <class Scheduler>
  CUTE_DEVICE void begin_store(Scheduler const& scheduler) {
    const WorkItem work = scheduler.work();  // again, rather than hold registers in the main loop
    locate(work, scheduler.place(work));
    // Scales and staging are in use until everybody, TMA too, is done with the tile before this
    // one.
    if (Tile::kStoresByTma && thread() == 0)
      cute::tma_store_wait<0>();
    if (Tile::kPairs || scheduler.item() > 0)  // groups that take turns end one after the other
      panel_barrier();
    stage_scales();
  }

  // -----------------------------------------------------------------------------------------------
  // Where this thread's values are, and what they become.

  CUTE_DEVICE void locate(WorkItem const& work, Place const& place) {
    first_token_ = place.first_token;
    tokens_ = place.tokens;
    first_channel_ = (place.first_panel + panel_) * kBlockRows;
    ownership_ = work.split ? alternate_chunks() : Ownership::kAllChunks;
  }

  CUTE_DEVICE Sums sums() const { return {cluster_, shared_, panel_}; }
  // Of a tile that a pair shares along K each CTA stores every other chunk.
  CUTE_DEVICE bool split() const { return ownership_ != Ownership::kAllChunks; }

  // Asked again rather than held in registers during the main loop.
  CUTE_DEVICE static int thread() { return Sums::thread(); }
  CUTE_DEVICE static int first_row() {  // of two, eight apart
    return threadIdx.x % kWarpGroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
  }
  CUTE_DEVICE static int first_token(int octet) {  // of two neighbours
    return 8 * octet + threadIdx.x % 4 * 2;
  }

  CUTE_DEVICE void panel_barrier() const { sums().panel_barrier(); }

  CUTE_DEVICE void stage_scales() {
    if (thread() < 2 * kBlockRows)
      shared_.channel_values[panel_][thread() / kBlockRows][thread() % kBlockRows] = channel_value_;
    CUTE_UNROLL
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int token = thread() + i * kThreads;
      if (token < Tile::kTokens)
        shared_.token_scale[panel_][token] = token_scale_[i];
    }
  }

  struct ChannelValues {
    float scale[2], bias[2];
  };
  CUTE_DEVICE ChannelValues channel_values() const {
    auto const& values = shared_.channel_values[panel_];
    const int row = first_row();
    return {{values[0][row], values[0][row + 8]}, {values[1][row], values[1][row + 8]}};
  }
  CUTE_DEVICE float2 token_scales(int octet) const {
    return *reinterpret_cast<float2 const*>(&shared_.token_scale[panel_][first_token(octet)]);
  }

  // -----------------------------------------------------------------------------------------------
  // Ways to y.

  // A chunk of tokens at a time; by TMA, it goes on while the next tile is computed.
  template <class Pair, class Accumulator>
  CUTE_DEVICE void store_rows(Accumulator const& acc) {
    constexpr int kChunk = Tile::kChunkTokens;
    constexpr int kRowBytes = kBlockRows * 2;
    const ChannelValues channels = channel_values();
    // stmatrix takes the address of a row of 16 bytes from every lane: lanes 0-7 and 8-15 those of
    // the tokens of an octet, for the upper and the lower eight channels; 16-31 of the next octet.
    // The swizzle of TMA keeps them free of bank conflicts.
    const int lane = threadIdx.x % 32;
    const int stage_at =
        (lane / 16 * 8 + lane % 8) * kRowBytes + swizzled(thread() / 32 * 2 + lane / 8 % 2, lane);
    const RowStore rows(*this);
    // One chunk is on its way to shared memory and out of it while the next one is rounded.
    Rounded<kChunk> rounded = round_chunk<Pair>(acc, 0, channels);
    CUTE_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      if (chunk * kChunk >= tokens_)
        break;
      const int turn = split() ? chunk / 2 : chunk;
      uint8_t* const buffer =
          shared_.staging[panel_] + turn % Tile::kChunkBuffers * Tile::kChunkBytes;
      if (owns(ownership_, chunk)) {
        CUTE_UNROLL
        for (int i = 0; i < kChunk / 16; ++i) {
          cute::SM90_U16x8_STSM_T::copy(
              rounded[4 * i], rounded[4 * i + 1], rounded[4 * i + 2], rounded[4 * i + 3],
              *reinterpret_cast<cute::uint128_t*>(&buffer[stage_at + i * 16 * kRowBytes]));
        }
      }
      if (chunk + 1 < Tile::kChunks && owns(ownership_, chunk + 1))
        rounded = round_chunk<Pair>(acc, chunk + 1, channels);
      if (owns(ownership_, chunk)) {
        if constexpr (Tile::kStoresByTma) {
          cute::tma_store_fence();
          if (thread() == 0)  // the buffer of the next chunk has been read
            cute::tma_store_wait<Tile::kChunkBuffers - 2>();
        }
        panel_barrier();
        // Rows past the last of x are clipped; those of the next tile are not this one's.
        const bool clipped = (chunk + 1) * kChunk <= tokens_ || first_token_ + tokens_ == sizes_.m;
        if (Tile::kStoresByTma && clipped) {
          if (thread() == 0) {
            cute::SM90_TMA_STORE_2D::copy(&map_, buffer, first_channel_,
                                          first_token_ + chunk * kChunk);
            cute::tma_store_arrive();
          }
        } else {
          rows.store(buffer, chunk * kChunk);
        }
      }
    }
  }

  // A thread's results of a chunk of tokens, two to a word: for every octet two words, of its two
  // channels.
  template <int kTokens>
  using Rounded = cute::array<uint32_t, kTokens / 4>;

  template <class Pair>
  CUTE_DEVICE cute::array<uint32_t, 2> round_octet(int octet,
                                                   int4 const& sum,
                                                   ChannelValues const& channels) const {
    const float2 token_scale = token_scales(octet);
    return {round_pair(scaled(sum.x, token_scale.x, channels.scale[0], channels.bias[0]),
                       scaled(sum.y, token_scale.y, channels.scale[0], channels.bias[0]), Pair{}),
            round_pair(scaled(sum.z, token_scale.x, channels.scale[1], channels.bias[1]),
                       scaled(sum.w, token_scale.y, channels.scale[1], channels.bias[1]), Pair{})};
  }

  template <class Pair, class Accumulator>
  CUTE_DEVICE auto round_chunk(Accumulator const& acc,
                               int chunk,
                               ChannelValues const& channels) const {
    constexpr int kOctets = Tile::kChunkTokens / 8;
    Rounded<Tile::kChunkTokens> rounded;
    CUTE_UNROLL
    for (int i = 0; i < kOctets; ++i) {
      const int octet = chunk * kOctets + i;
      const auto words = round_octet<Pair>(octet, octet_of(acc, octet), channels);
      rounded[2 * i] = words[0];
      rounded[2 * i + 1] = words[1];
    }
    return rounded;
  }

  // Without TMA: eight threads write the 64 channels of a token, sixteen tokens at a time.
  class RowStore {
    static constexpr int kRowBytes = kBlockRows * 2;
    static constexpr int kRows = kWarpGroupThreads / (kRowBytes / 16);

   public:
    CUTE_DEVICE explicit RowStore(Epilogue const& e) : row_bytes_(e.params_.y_stride * 2) {
      const int row = thread() / (kRowBytes / 16), vector = thread() % (kRowBytes / 16);
      const int channel = e.first_channel_ + vector * 8;
      rows_ = channel < e.sizes_.n ? e.tokens_ - row : 0;
      staged_at_ = row * kRowBytes + swizzled(vector, row);
      y_ = static_cast<uint8_t*>(e.params_.y) + (e.first_token_ + row) * row_bytes_ + channel * 2;
      // Hides where it comes from: the compiler would compute it anew for every row.
      asm volatile("" : "+l"(y_), "+l"(row_bytes_));
      __builtin_assume(__isGlobal(y_));
    }

    CUTE_DEVICE void store(uint8_t const* buffer, int first_token) const {
      CUTE_UNROLL
      for (int row = 0; row < Tile::kChunkTokens; row += kRows) {
        if (first_token + row < rows_) {
          *reinterpret_cast<uint4*>(y_ + (first_token + row) * row_bytes_) =
              *reinterpret_cast<uint4 const*>(&buffer[staged_at_ + row * kRowBytes]);
        }
      }
    }

   private:
    uint8_t* y_;
    int64_t row_bytes_;
    int rows_;  // of this thread's rows, how many from its first one on are to be stored
    int staged_at_;
  };

  // Sums of groups that took turns: the 8 x 8 matrices of an octet are transposed, from a thread's
  // channel to a thread's token, and four threads write eight channels of it.
  template <class Pair>
  CUTE_DEVICE void store_columns(typename Sums::Octets const& sums_of_group, int k_group) const {
    if (Sums::kOverlaps && cluster_.log2_split == 0) {
      store_columns<Pair, false>(sums_of_group, k_group);
    } else {
      store_columns<Pair, true>(sums_of_group, k_group);
    }
  }
  template <class Pair, bool kSkips>
  CUTE_DEVICE void store_columns(typename Sums::Octets const& sums_of_group, int k_group) const {
    const ChannelValues channels = channel_values();
    const int lane = threadIdx.x % 32;
    const int channel = first_channel_ + threadIdx.x % kWarpGroupThreads / 32 * 16;
    const int64_t turn_stride = 8 * Tile::kKGroups * params_.y_stride;
    const int first = 8 * k_group + lane / 4;
    uint16_t* const y = static_cast<uint16_t*>(params_.y) +
                        (first_token_ + first) * params_.y_stride + channel + lane % 4 * 2;
    CUTE_UNROLL
    for (int turn = 0; turn < Sums::kTurns; ++turn) {
      if (kSkips && !sums().owns(turn, k_group))
        continue;
      const int octet = min(Sums::octet_of_turn(turn, k_group), Tile::kOctets - 1);
      const auto words = round_octet<Pair>(octet, sums_of_group[turn], channels);
      uint16_t* const row = y + turn * turn_stride;
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        uint32_t transposed;
        cute::SM75_U32x1_MOVM_T::copy(words[i], transposed);
        // Rows are whole vectors of eight channels.
        if (first + turn * 8 * Tile::kKGroups < tokens_ && channel + 8 * i < sizes_.n)
          *reinterpret_cast<uint32_t*>(row + 8 * i) = transposed;
      }
    }
  }

  // Other types and alignments: through shared memory, since registers cannot be indexed at run
  // time and unrolled the code would be long.
  CUTE_DEVICE void store_turns(typename Sums::Octets const& sums_of_group, int k_group) const {
    CUTE_UNROLL
    for (int turn = 0; turn < Sums::kTurns; ++turn) {
      if (sums().owns(turn, k_group))
        *sums().group_part(Sums::octet_of_turn(turn, k_group), 0) = sums_of_group[turn];
    }
    CUTE_NO_UNROLL
    for (int turn = 0; turn < Sums::kTurns; ++turn) {
      const int octet = Sums::octet_of_turn(turn, k_group);
      if (sums().owns(turn, k_group))
        store_octet(octet, *sums().group_part(octet, 0));
    }
  }

  // Where a vector of 16 bytes is in a row of 128, by TMA's swizzle.
  CUTE_DEVICE static int swizzled(int vector, int row) { return (vector ^ row % 8) * 16; }

  // The same, in rounds of a chunk.
  template <class Accumulator>
  CUTE_DEVICE void store_octets(Accumulator const& acc) const {
    constexpr int kOctets = Tile::kChunkTokens / 8;
    CUTE_NO_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      CUTE_UNROLL
      for (int c = 0; c < Tile::kChunks; ++c) {
        if (c == chunk) {
          CUTE_UNROLL
          for (int i = 0; i < kOctets; ++i)
            *sums().staged(i) = octet_of(acc, c * kOctets + i);
        }
      }
      if (owns(ownership_, chunk)) {
        CUTE_NO_UNROLL
        for (int i = 0; i < kOctets; ++i)
          store_octet(chunk * kOctets + i, *sums().staged(i));
      }
    }
  }

  // -----------------------------------------------------------------------------------------------
  // Element by element.

  CUTE_DEVICE void store_octet(int octet, int4 const& sum) const {
    if (params_.y_type == Element::kInt32)
      return store_elements<int32_t>(octet, {sum.x, sum.y, sum.z, sum.w});
    const ChannelValues channels = channel_values();
    const float2 token_scale = token_scales(octet);
    const float y[4] = {scaled(sum.x, token_scale.x, channels.scale[0], channels.bias[0]),
                        scaled(sum.y, token_scale.y, channels.scale[0], channels.bias[0]),
                        scaled(sum.z, token_scale.x, channels.scale[1], channels.bias[1]),
                        scaled(sum.w, token_scale.y, channels.scale[1], channels.bias[1])};
    if (params_.y_type == Element::kBFloat16) {
      store_elements<__nv_bfloat16>(octet, {__float2bfloat16_rn(y[0]), __float2bfloat16_rn(y[1]),
                                            __float2bfloat16_rn(y[2]), __float2bfloat16_rn(y[3])});
    } else if (params_.y_type == Element::kFloat16) {
      store_elements<__half>(octet, {__float2half_rn(y[0]), __float2half_rn(y[1]),
                                     __float2half_rn(y[2]), __float2half_rn(y[3])});
    } else {
      store_elements<float>(octet, {y[0], y[1], y[2], y[3]});
    }
  }

  // Two tokens of a channel, two of the channel eight further on.
  template <class T>
  CUTE_DEVICE void store_elements(int octet, cute::array<T, 4> const& elements) const {
    const int token = first_token(octet);
    const int channels = sizes_.n - first_channel_ - first_row();
    T* const y = static_cast<T*>(params_.y) + (first_token_ + token) * params_.y_stride +
                 first_channel_ + first_row();
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (token + i % 2 < tokens_ && i / 2 * 8 < channels)
        y[i % 2 * params_.y_stride + i / 2 * 8] = elements[i];
    }
  }

  Sizes const& sizes_;
  OutputParams const& params_;
  CUtensorMap const& map_;  // of y
  ClusterParams const& cluster_;
  SharedStorage<Tile>& shared_;
  int panel_;
  int first_token_, tokens_, first_channel_;
  Ownership ownership_;
  float channel_value_;
  float token_scale_[kScalesPerThread];
};

}  // namespace liquidgemm
