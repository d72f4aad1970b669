// The epilogue: int32 partial sums -> y[m, n] = float(sum) * x_scale[m] * weight_scale[n] (+
// bias[n]), rounded after each operation, left to right.
//
// The accumulators hold Y transposed. They pass through shared memory, a chunk of tokens at a time,
// where rows of y become contiguous. There are three ways:
//
//   store_rounded  one group has all of K and y has 16 bits: rounded in registers, transposed by
//                  stmatrix, eight threads write the 64 channels of a token
//   store_local    the partial sums of the panel's k groups are added; any type of y
//   store_split    and those of every CTA of the cluster
//
// Integer addition makes any split exact.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>

#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/ring.hpp"
#include "liquidgemm/kernel/scheduler.hpp"

namespace liquidgemm {

CUTE_DEVICE float load_as_float(void const* base, Element type, int i) {
  switch (type) {
    case Element::kBFloat16:
      return __bfloat162float(static_cast<__nv_bfloat16 const*>(base)[i]);
    case Element::kFloat16:
      return __half2float(static_cast<__half const*>(base)[i]);
    default:
      return static_cast<float const*>(base)[i];
  }
}

// `values` are the bits of four consecutive elements; those at or past `count` are not stored.
template <class T>
CUTE_DEVICE void store_row(T* out, T const (&values)[4], int count, bool aligned) {
  if (count >= 4 && aligned) {
    using Vector = cute::conditional_t<sizeof(T) == 4, uint4, uint2>;
    *reinterpret_cast<Vector*>(out) = *reinterpret_cast<Vector const*>(values);
  } else {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i < count)
        out[i] = values[i];
    }
  }
}

template <class Tile>
class Epilogue {
  static constexpr int kThreads = Tile::kKGroups * kWarpGroupThreads;  // that share a panel
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kChannelsPerThread = 4;
  static constexpr int kThreadsPerToken = kBlockRows / kChannelsPerThread;
  static constexpr int kTokensAtOnce = kThreads / kThreadsPerToken;
  static constexpr int kScalesPerThread = (Tile::kTokens + kThreads - 1) / kThreads;

 public:
  CUTE_DEVICE Epilogue(KernelParams const& params, SharedStorage<Tile>& shared, int panel)
      : params_(params), shared_(shared), panel_(panel) {}

  CUTE_DEVICE static void init_barriers(SharedStorage<Tile>& shared, int split_k) {
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      cutlass::arch::ClusterBarrier::init(&shared.staged[panel], 1);
      cutlass::arch::ClusterBarrier::init(&shared.drained[panel], kWarps * split_k);
    }
  }

  // After `iteration` tiles: peers address this CTA's staging no more, it may exit.
  CUTE_DEVICE void finish_cluster(int iteration) const {
    if (params_.split_k > 1) {
      cutlass::arch::ClusterBarrier::wait(&shared_.drained[panel_], chunk_phase(iteration, -1));
    }
  }

  // Requests what does not depend on the sums, to arrive under the main loop.
  CUTE_DEVICE void prefetch(TileCoord coord) {
    locate(coord);
    const int panel_channel = first_channel_ - thread_channel();
    // One register each: the first 64 threads carry the channels' scales, the next 64 their biases.
    const int channel = panel_channel + thread() % kBlockRows;
    channel_value_ = -0.f;  // the bias that changes no bit of what it is added to
    if (channel < params_.n && thread() < kBlockRows) {
      channel_value_ = params_.weight_scale[channel];
    } else if (channel < params_.n && thread() < 2 * kBlockRows && params_.bias) {
      channel_value_ = load_as_float(params_.bias, params_.bias_type, channel);
    }
    CUTE_UNROLL
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int token = thread() + i * kThreads;
      const bool inside = token < Tile::kTokens && first_token_ + token < params_.m;
      token_scale_[i] = inside ? params_.x_scale[first_token_ + token] : 0.f;
    }
  }

  template <class Accumulator>
  CUTE_DEVICE void store(TileScheduler const& scheduler, Accumulator const& acc, int k_group) {
    locate(scheduler.coord());  // again, rather than hold registers during the main loop
    if (params_.split_k > 1) {
      store_split(scheduler.iteration(), acc, k_group);
      return;
    }
    if constexpr (Tile::kKGroups == 1) {
      if (rows_are_vectors()) {
        if (params_.y_type == Element::kBFloat16)
          return store_rounded<__nv_bfloat162>(acc);
        if (params_.y_type == Element::kFloat16)
          return store_rounded<__half2>(acc);
      }
    }
    store_local(acc, k_group);
  }

 private:
  // Whether every row of y is a whole number of aligned 16-byte vectors, for elements of 2 bytes.
  CUTE_DEVICE bool rows_are_vectors() const {
    return (reinterpret_cast<uintptr_t>(params_.y) | (params_.y_stride * 2) | (params_.n * 2)) %
               16 ==
           0;
  }

  CUTE_DEVICE static uint32_t round_pair(float low, float high, __nv_bfloat162) {
    return bits_of(__floats2bfloat162_rn(low, high));
  }
  CUTE_DEVICE static uint32_t round_pair(float low, float high, __half2) {
    return bits_of(__floats2half2_rn(low, high));
  }
  template <class Pair>
  CUTE_DEVICE static uint32_t bits_of(Pair pair) {
    return reinterpret_cast<uint32_t const&>(pair);
  }

  // While a chunk is read and stored, the next one is staged in the other buffer: one barrier per
  // chunk. The first one also says that everybody is done with the tile before this one.
  template <class Pair, class Accumulator>
  CUTE_DEVICE void store_rounded(Accumulator const& acc) {
    constexpr int kChunk = Tile::kRoundedChunkTokens;
    constexpr int kVector = 8;  // elements
    constexpr int kThreadsPerRow = kBlockRows / kVector;
    constexpr int kRowsAtOnce = kThreads / kThreadsPerRow;
    stage_scales();
    panel_barrier();
    const int lane = threadIdx.x % 32;
    const int warp_row = thread() / 32 * 16;
    const int row = warp_row + lane / 4;
    auto const& channel_values = shared_.channel_values[panel_];
    const float scale[2] = {channel_values[0][row], channel_values[0][row + 8]};
    const float bias[2] = {channel_values[1][row], channel_values[1][row + 8]};
    // stmatrix takes the address of a row of 16 bytes from every lane: lanes 0-7 and 8-15 those of
    // the tokens of an octet, for the upper and the lower eight channels; 16-31 of the next octet.
    const int stage_offset = (lane / 16 * 8 + lane % 8) * Tile::kRoundedPitch + warp_row +
                             lane / 8 % 2 * 8;
    const int load_token = thread() / kThreadsPerRow;
    const int load_channel = thread() % kThreadsPerRow * kVector;
    const int channel = first_channel_ - thread_channel() + load_channel;
    const int tokens = params_.m - first_token_;
    uint16_t* const y = static_cast<uint16_t*>(params_.y) +
                        (first_token_ + load_token) * params_.y_stride + channel;
    CUTE_UNROLL
    for (int chunk = 0; chunk < Tile::kTokens / kChunk; ++chunk) {
      if (chunk * kChunk < tokens) {
        auto* const staging = reinterpret_cast<uint16_t*>(shared_.staging[chunk % 2][panel_]);
        CUTE_UNROLL
        for (int pair = 0; pair < kChunk / 16; ++pair) {
          uint32_t rounded[4];
          CUTE_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int octet = chunk * (kChunk / 8) + 2 * pair + i / 2;
            const int half = i % 2;
            const float2 token_scale = *reinterpret_cast<float2 const*>(
                &shared_.token_scale[panel_][8 * octet + lane % 4 * 2]);
            const int sum0 = acc(cute::make_coord(0, half, octet), 0, 0);
            const int sum1 = acc(cute::make_coord(1, half, octet), 0, 0);
            rounded[i] = round_pair(output(sum0, token_scale.x, scale[half], bias[half]),
                                    output(sum1, token_scale.y, scale[half], bias[half]), Pair{});
          }
          cute::SM90_U16x8_STSM_T::copy(
              rounded[0], rounded[1], rounded[2], rounded[3],
              *reinterpret_cast<cute::uint128_t*>(
                  &staging[stage_offset + pair * 16 * Tile::kRoundedPitch]));
        }
        panel_barrier();
        CUTE_UNROLL
        for (int i = 0; i < kChunk / kRowsAtOnce; ++i) {
          const int token = chunk * kChunk + i * kRowsAtOnce;
          const uint4 vector = *reinterpret_cast<uint4 const*>(
              &staging[(load_token + i * kRowsAtOnce) * Tile::kRoundedPitch + load_channel]);
          if (load_token + token < tokens && channel < params_.n)
            *reinterpret_cast<uint4*>(y + token * params_.y_stride) = vector;
        }
      }
    }
  }

  CUTE_DEVICE static float output(int32_t sum, float token_scale, float scale, float bias) {
    return __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(sum), token_scale), scale), bias);
  }

  // One CTA has all of K. While a chunk is read and stored, the next one is staged in the other
  // buffer: one barrier per chunk.
  template <class Accumulator>
  CUTE_DEVICE void store_local(Accumulator const& acc, int k_group) {
    panel_barrier();  // everybody is done reading the tile before this one
    stage_scales();
    stage_local(acc, 0, k_group);
    const int chunks =
        min(Tile::kChunks, cute::ceil_div(params_.m - first_token_, +Tile::kChunkTokens));
    CUTE_NO_UNROLL
    for (int chunk = 0; chunk < chunks; ++chunk) {
      panel_barrier();
      if (chunk + 1 < chunks)
        stage_local(acc, chunk + 1, k_group);
      auto const* const staging = staged_sums(chunk % Tile::kStagingBuffers);
      CUTE_UNROLL
      for (int i = 0; i < cute::ceil_div(+Tile::kChunkTokens, kTokensAtOnce); ++i) {
        const int token = thread() / kThreadsPerToken + i * kTokensAtOnce;
        if (token < Tile::kChunkTokens) {
          int4 sum = make_int4(0, 0, 0, 0);
          CUTE_UNROLL
          for (int source = 0; source < Tile::kKGroups; ++source)
            add(sum, &staging[source * Tile::kChunkTokens + token][thread_channel()]);
          finish(sum, chunk * Tile::kChunkTokens + token);
        }
      }
    }
  }

  template <class Accumulator>
  CUTE_DEVICE void stage_local(Accumulator const& acc, int chunk, int k_group) {
    auto* const staging = staged_sums(chunk % Tile::kStagingBuffers);
    for_each_sum(acc, chunk, [&](int token, int row, int32_t sum) {
      staging[k_group * Tile::kChunkTokens + token][row] = sum;
    });
  }

  // A cluster's CTAs have parts of K. Each finishes an equal share of a chunk's tokens; every group
  // sends its sums from registers straight into the staging memory of the CTA that finishes them.
  template <class Accumulator>
  CUTE_DEVICE void store_split(int iteration, Accumulator const& acc, int k_group) {
    constexpr int kLog2Chunk = cute::log_2(static_cast<unsigned>(Tile::kChunkTokens));
    const int share = kLog2Chunk - (31 - __clz(params_.split_k));  // log2 of tokens per CTA
    const int cta_rank = cute::block_rank_in_cluster();
    const int own_row = (cta_rank * Tile::kKGroups + k_group) << share;
    auto* const staging = staged_sums(0);
    uint64_t* const staged = &shared_.staged[panel_];
    uint64_t* const drained = &shared_.drained[panel_];

    CUTE_NO_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      const uint32_t phase = chunk_phase(iteration, chunk);
      cutlass::arch::ClusterBarrier::wait(drained, phase ^ 1);
      if (thread() == 0) {
        constexpr uint32_t kBytes =
            Tile::kKGroups * Tile::kChunkTokens * kBlockRows * sizeof(int32_t);
        cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(staged, kBytes);
      }
      if (chunk == 0)
        stage_scales();
      for_each_sum(acc, chunk, [&](int token, int row, int32_t sum) {
        const int owner = token >> share;
        const int token_of_owner = token - (owner << share);
        store_at_cluster(peer_address(&staging[own_row + token_of_owner][row], owner), sum,
                         peer_address(staged, owner));
      });
      panel_barrier();  // the scales
      cutlass::arch::ClusterBarrier::wait(staged, phase);

      for (int token = thread() / kThreadsPerToken; token < 1 << share; token += kTokensAtOnce) {
        int4 sum = make_int4(0, 0, 0, 0);
        for (int source = 0; source < Tile::kKGroups * params_.split_k; source += Tile::kKGroups) {
          CUTE_UNROLL
          for (int i = 0; i < Tile::kKGroups; ++i)
            add(sum, &staging[((source + i) << share) + token][thread_channel()]);
        }
        finish(sum, chunk * Tile::kChunkTokens + (cta_rank << share) + token);
      }
      __syncwarp();
      const int lane = threadIdx.x % 32;
      arrive_at_cluster_if(lane < params_.split_k, drained, lane);
    }
  }

  CUTE_DEVICE void locate(TileCoord coord) {
    first_token_ = coord.m_tile * Tile::kTokens;
    first_channel_ = (coord.n_tile * Tile::kPanels + panel_) * kBlockRows + thread_channel();
  }

  // Asked again rather than held in registers during the main loop.
  CUTE_DEVICE static int thread() { return threadIdx.x % kThreads; }  // within the panel
  CUTE_DEVICE static int thread_channel() {
    return thread() % kThreadsPerToken * kChannelsPerThread;
  }

  // With split K every tile has all its chunks, so the phase need not be carried.
  CUTE_DEVICE static uint32_t chunk_phase(int iteration, int chunk) {
    return (iteration * Tile::kChunks + chunk) & 1;
  }

  CUTE_DEVICE void panel_barrier() const {
    cutlass::arch::NamedBarrier::arrive_and_wait(kThreads, panel_);
  }

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

  using SumRow = int32_t[Tile::kStagingPitch];

  CUTE_DEVICE SumRow* staged_sums(int buffer) const {
    return reinterpret_cast<SumRow*>(shared_.staging[buffer][panel_]);
  }

  // This thread's sums of a chunk, with their token in the chunk and their row of the panel.
  template <class Accumulator, class Body>
  CUTE_DEVICE static void for_each_sum(Accumulator const& acc, int chunk, Body const& body) {
    constexpr int kOctets = Tile::kChunkTokens / 8;
    const int lane = threadIdx.x % 32;
    const int first_row = 16 * (threadIdx.x / 32 % 4) + lane / 4;
    CUTE_UNROLL
    for (int c = 0; c < Tile::kChunks; ++c) {  // registers cannot be indexed at run time
      if (c == chunk) {
        CUTE_UNROLL
        for (int octet = 0; octet < kOctets; ++octet) {
          CUTE_UNROLL
          for (int odd = 0; odd < 2; ++odd) {
            CUTE_UNROLL
            for (int half = 0; half < 2; ++half) {
              body(8 * octet + 2 * (lane % 4) + odd, first_row + 8 * half,
                   acc(cute::make_coord(odd, half, c * kOctets + octet), 0, 0));
            }
          }
        }
      }
    }
  }

  CUTE_DEVICE static void add(int4& sum, int32_t const* staged) {
    const int4 part = *reinterpret_cast<int4 const*>(staged);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }

  CUTE_DEVICE void finish(int4 sum, int token_in_tile) const {
    const int m = first_token_ + token_in_tile;
    if (m >= params_.m)
      return;
    const float token_scale = shared_.token_scale[panel_][token_in_tile];
    const int count = params_.n - first_channel_;
    const bool aligned = params_.y_stride % kChannelsPerThread == 0;
    const int64_t at = m * params_.y_stride + first_channel_;
    const int sums[4] = {sum.x, sum.y, sum.z, sum.w};
    if (params_.y_type == Element::kInt32)
      return store_row(static_cast<int*>(params_.y) + at, sums, count, aligned);

    const int channel = thread_channel();
    float y[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      y[i] = output(sums[i], token_scale, shared_.channel_values[panel_][0][channel + i],
                    shared_.channel_values[panel_][1][channel + i]);
    }
    if (params_.y_type == Element::kFloat32) {
      store_row(static_cast<float*>(params_.y) + at, y, count, aligned);
    } else if (params_.y_type == Element::kBFloat16) {
      alignas(8)
          const __nv_bfloat16 out[4] = {__float2bfloat16_rn(y[0]), __float2bfloat16_rn(y[1]),
                                        __float2bfloat16_rn(y[2]), __float2bfloat16_rn(y[3])};
      store_row(static_cast<__nv_bfloat16*>(params_.y) + at, out, count, aligned);
    } else {
      alignas(8) const __half out[4] = {__float2half_rn(y[0]), __float2half_rn(y[1]),
                                        __float2half_rn(y[2]), __float2half_rn(y[3])};
      store_row(static_cast<__half*>(params_.y) + at, out, count, aligned);
    }
  }

  KernelParams const& params_;
  SharedStorage<Tile>& shared_;
  int panel_;
  int first_token_, first_channel_;
  float channel_value_;
  float token_scale_[kScalesPerThread];
};

}  // namespace liquidgemm
