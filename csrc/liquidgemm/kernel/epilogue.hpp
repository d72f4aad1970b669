// The epilogue: int32 partial sums -> y[m, n] = float(sum) * x_scale[m] * weight_scale[n] (+
// bias[n]), rounded after each operation, left to right.
//
// The accumulators hold Y transposed. They pass through shared memory, a chunk of tokens at a time,
// where the partial sums of the panel's k groups and, with split K, of every CTA of the cluster are
// added, and where rows of y become contiguous: sixteen threads write the 64 channels of a token.
// Integer addition makes any split exact.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>
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

 public:
  CUTE_DEVICE Epilogue(KernelParams const& params, SharedStorage<Tile>& shared, int panel)
      : params_(params), shared_(shared), panel_(panel) {}

  CUTE_DEVICE static void init_barriers(SharedStorage<Tile>& shared, int split_k) {
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      cutlass::arch::ClusterBarrier::init(&shared.staged[panel], 1);
      cutlass::arch::ClusterBarrier::init(&shared.drained[panel], kWarps * split_k);
    }
  }

  // After the last tile: peers address this CTA's staging no more, it may exit.
  CUTE_DEVICE void finish_cluster() const {
    if (split())
      cutlass::arch::ClusterBarrier::wait(&shared_.drained[panel_], phase_);
  }

  // Requests what does not depend on the sums, to arrive under the main loop.
  CUTE_DEVICE void prefetch(TileCoord coord) {
    locate(coord);
    const int panel_channel = first_channel_ - thread() % kThreadsPerToken * kChannelsPerThread;
    // One register each: the first 64 threads carry the channels' scales, the next 64 their biases.
    const int channel = panel_channel + thread() % kBlockRows;
    channel_value_ = 0.f;
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
    CUTE_NO_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      // With split K every tile has kChunks chunks, so that the phase is known without being
      // carried.
      phase_ = (scheduler.iteration() * Tile::kChunks + chunk) & 1;
      if (!split() && first_token_ + chunk * Tile::kChunkTokens >= params_.m) {
        break;
      }
      begin_chunk();
      if (chunk == 0)
        stage_scales();
      CUTE_UNROLL
      for (int c = 0; c < Tile::kChunks; ++c) {  // registers cannot be indexed at run time
        if (c == chunk)
          stage(acc, c, k_group);
      }
      publish_chunk();
      store_chunk(chunk);
      end_chunk();
    }
  }

 private:
  static constexpr int kScalesPerThread = (Tile::kTokens + kThreads - 1) / kThreads;

  CUTE_DEVICE void locate(TileCoord coord) {
    first_token_ = coord.m_tile * Tile::kTokens;
    first_channel_ = (coord.n_tile * Tile::kPanels + panel_) * kBlockRows +
                     thread() % kThreadsPerToken * kChannelsPerThread;
  }

  // Asked again rather than held in registers during the main loop.
  CUTE_DEVICE static int thread() { return threadIdx.x % kThreads; }  // within the panel
  CUTE_DEVICE int cta_rank() const { return split() ? cute::block_rank_in_cluster() : 0; }

  // log2 of the tokens of a chunk that each CTA of the cluster finishes.
  CUTE_DEVICE int token_share() const {
    constexpr int kLog2 = cute::log_2(static_cast<unsigned>(Tile::kChunkTokens));
    return kLog2 - (31 - __clz(params_.split_k));
  }

  CUTE_DEVICE bool split() const { return params_.split_k > 1; }

  CUTE_DEVICE void panel_barrier() const {
    cutlass::arch::NamedBarrier::arrive_and_wait(kThreads, panel_);
  }

  // Staging may be overwritten once every reader of the last chunk is done.
  CUTE_DEVICE void begin_chunk() const {
    if (!split())
      return;  // see end_chunk
    cutlass::arch::ClusterBarrier::wait(&shared_.drained[panel_], phase_ ^ 1);
    if (thread() == 0) {
      constexpr uint32_t kBytes =
          Tile::kKGroups * Tile::kChunkTokens * kBlockRows * sizeof(int32_t);
      cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&shared_.staged[panel_],
                                                                     kBytes);
    }
  }
  CUTE_DEVICE void publish_chunk() const {
    // Within the CTA: the sums themselves or, with split K, the scales.
    panel_barrier();
    if (split())
      cutlass::arch::ClusterBarrier::wait(&shared_.staged[panel_], phase_);
  }
  CUTE_DEVICE void end_chunk() {
    if (!split())
      return panel_barrier();
    __syncwarp();
    const int lane = threadIdx.x % 32;
    arrive_at_cluster_if(lane < params_.split_k, &shared_.drained[panel_], lane);
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

  // Row of staging: partial sums of one source (k group of a CTA) for one token; sources of a token
  // lie kChunkTokens / split_k rows apart.
  template <class Accumulator>
  CUTE_DEVICE void stage(Accumulator const& acc, int chunk, int k_group) {
    const int lane = threadIdx.x % 32;
    const int row = 16 * (threadIdx.x / 32 % 4) + lane / 4;
    const int share = token_share();
    const int tokens_per_cta = 1 << share;
    const int source = cta_rank() * Tile::kKGroups + k_group;
    auto& staging = shared_.staging[panel_];
    CUTE_UNROLL
    for (int octet = 0; octet < Tile::kChunkTokens / 8; ++octet) {
      CUTE_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const int token = 8 * octet + 2 * (lane % 4) + odd;
        const int owner = token >> share;
        int32_t* const to = &staging[(source << share) + (token & (tokens_per_cta - 1))][row];
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int32_t sum =
              acc(cute::make_coord(odd, half, chunk * (Tile::kChunkTokens / 8) + octet), 0, 0);
          if (split()) {
            store_at_cluster(peer_address(to + 8 * half, owner), sum,
                             peer_address(&shared_.staged[panel_], owner));
          } else {
            to[8 * half] = sum;
          }
        }
      }
    }
  }

  CUTE_DEVICE void store_chunk(int chunk) {
    const int tokens_per_cta = 1 << token_share();
    const int begin = chunk * Tile::kChunkTokens + cta_rank() * tokens_per_cta;  // in the tile
    const int count = min(tokens_per_cta, params_.m - first_token_ - begin);
    const int channel = thread() % kThreadsPerToken * kChannelsPerThread;
    for (int token = thread() / kThreadsPerToken; token < count; token += kTokensAtOnce) {
      int4 sum = make_int4(0, 0, 0, 0);
      for (int cta = 0; cta < params_.split_k; ++cta) {
        CUTE_UNROLL
        for (int k_group = 0; k_group < Tile::kKGroups; ++k_group) {
          const int source = cta * Tile::kKGroups + k_group;
          int32_t const* from = &shared_.staging[panel_][source * tokens_per_cta + token][channel];
          const int4 part = *reinterpret_cast<int4 const*>(from);
          sum.x += part.x;
          sum.y += part.y;
          sum.z += part.z;
          sum.w += part.w;
        }
      }
      finish(sum, first_token_ + begin + token, shared_.token_scale[panel_][begin + token]);
    }
  }

  CUTE_DEVICE void finish(int4 sum, int m, float token_scale) const {
    const int count = params_.n - first_channel_;
    const bool aligned = params_.y_stride % kChannelsPerThread == 0;
    const int64_t at = m * params_.y_stride + first_channel_;
    const int sums[4] = {sum.x, sum.y, sum.z, sum.w};
    if (params_.y_type == Element::kInt32)
      return store_row(static_cast<int*>(params_.y) + at, sums, count, aligned);

    const int channel = thread() % kThreadsPerToken * kChannelsPerThread;
    float y[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float scaled = __fmul_rn(__int2float_rn(sums[i]), token_scale);
      y[i] = __fmul_rn(scaled, shared_.channel_values[panel_][0][channel + i]);
      if (params_.bias)
        y[i] = __fadd_rn(y[i], shared_.channel_values[panel_][1][channel + i]);
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
  uint32_t phase_;
  int first_token_, first_channel_;
  float channel_value_;
  float token_scale_[kScalesPerThread];
};

}  // namespace liquidgemm
