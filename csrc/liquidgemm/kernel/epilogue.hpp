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

#include <cute/tensor.hpp>

#include "liquidgemm/kernel/params.hpp"
#include "liquidgemm/kernel/ring.hpp"
#include "liquidgemm/kernel/scheduler.hpp"

namespace liquidgemm {

CUTE_DEVICE int4 load_staged(int32_t const* staged, int cta_rank, bool remote) {
  int4 v;
  if (!remote)
    return *reinterpret_cast<int4 const*>(staged);
  asm volatile(
      "{\n"
      ".reg .b32 peer;\n"
      "mapa.shared::cluster.u32 peer, %4, %5;\n"
      "ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [peer];\n"
      "}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(cute::cast_smem_ptr_to_uint(staged)), "r"(cta_rank)
      : "memory");
  return v;
}

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
  CUTE_DEVICE Epilogue(
      KernelParams const& params, SharedStorage<Tile>& shared, int cta_rank, int panel, int thread)
      : params_(params), shared_(shared), cta_rank_(cta_rank), panel_(panel), thread_(thread) {}

  // Arrivals that complete `staged` and `drained` once.
  CUTE_DEVICE static int arrivals(int split_k) { return kWarps * split_k; }

  // Requests what does not depend on the sums, to arrive under the main loop.
  CUTE_DEVICE void prefetch(TileCoord coord) {
    first_token_ = coord.m_tile * Tile::kTokens;
    const int panel_channel = (coord.n_tile * Tile::kPanels + panel_) * kBlockRows;
    first_channel_ = panel_channel + thread_ % kThreadsPerToken * kChannelsPerThread;
    // One register each: the first 64 threads carry the channels' scales, the next 64 their biases.
    const int channel = panel_channel + thread_ % kBlockRows;
    channel_value_ = 0.f;
    if (channel < params_.n && thread_ < kBlockRows) {
      channel_value_ = params_.weight_scale[channel];
    } else if (channel < params_.n && thread_ < 2 * kBlockRows && params_.bias) {
      channel_value_ = load_as_float(params_.bias, params_.bias_type, channel);
    }
    CUTE_UNROLL
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int token = thread_ + i * kThreads;
      const bool inside = token < Tile::kTokens && first_token_ + token < params_.m;
      token_scale_[i] = inside ? params_.x_scale[first_token_ + token] : 0.f;
    }
  }

  template <class Accumulator>
  CUTE_DEVICE void store(Accumulator const& acc, int k_group) {
    CUTE_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      if (first_token_ + chunk * Tile::kChunkTokens >= params_.m)
        break;
      begin_chunk();
      if (chunk == 0)
        stage_scales();
      stage(acc, chunk, k_group);
      publish_chunk();
      store_chunk(chunk);
      end_chunk();
    }
  }

 private:
  static constexpr int kScalesPerThread = (Tile::kTokens + kThreads - 1) / kThreads;

  CUTE_DEVICE bool split() const { return params_.split_k > 1; }

  CUTE_DEVICE void panel_barrier() const {
    cutlass::arch::NamedBarrier::arrive_and_wait(kThreads, panel_);
  }

  CUTE_DEVICE void arrive_at_all(uint64_t* barrier) const {
    __syncwarp();
    if (threadIdx.x % 32 < params_.split_k)
      arrive_at_cluster(barrier, threadIdx.x % 32);
  }

  // Staging may be overwritten once every reader of the last chunk, in every CTA of the cluster, is
  // done.
  CUTE_DEVICE void begin_chunk() const {
    if (split())
      wait_cluster(&shared_.drained[panel_], phase_ ^ 1);
  }
  CUTE_DEVICE void publish_chunk() const {
    if (split()) {
      arrive_at_all(&shared_.staged[panel_]);
      wait_cluster(&shared_.staged[panel_], phase_);
    } else {
      panel_barrier();
    }
  }
  CUTE_DEVICE void end_chunk() {
    if (split()) {
      arrive_at_all(&shared_.drained[panel_]);
      phase_ ^= 1;
    } else {
      panel_barrier();
    }
  }

  CUTE_DEVICE void stage_scales() {
    if (thread_ < 2 * kBlockRows)
      shared_.channel_values[panel_][thread_ / kBlockRows][thread_ % kBlockRows] = channel_value_;
    CUTE_UNROLL
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int token = thread_ + i * kThreads;
      if (token < Tile::kTokens)
        shared_.token_scale[panel_][token] = token_scale_[i];
    }
  }

  template <class Accumulator>
  CUTE_DEVICE void stage(Accumulator const& acc, int chunk, int k_group) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    auto& staging = shared_.staging[panel_][k_group];
    CUTE_UNROLL
    for (int octet = 0; octet < Tile::kChunkTokens / 8; ++octet) {
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        CUTE_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          staging[8 * octet + 2 * (lane % 4) + odd][16 * warp + 8 * half + lane / 4] =
              acc(cute::make_coord(odd, half, chunk * (Tile::kChunkTokens / 8) + octet), 0, 0);
        }
      }
    }
  }

  // The CTAs of a cluster share the tokens of a chunk.
  CUTE_DEVICE void store_chunk(int chunk) {
    const int begin = Tile::kChunkTokens * cta_rank_ / params_.split_k;
    const int end = min(Tile::kChunkTokens * (cta_rank_ + 1) / params_.split_k,
                        params_.m - first_token_ - chunk * Tile::kChunkTokens);
    const int channel = thread_ % kThreadsPerToken * kChannelsPerThread;
    for (int token = begin + thread_ / kThreadsPerToken; token < end; token += kTokensAtOnce) {
      int4 sum = make_int4(0, 0, 0, 0);
      for (int cta = 0; cta < params_.split_k; ++cta) {
        CUTE_UNROLL
        for (int k_group = 0; k_group < Tile::kKGroups; ++k_group) {
          const int4 part =
              load_staged(&shared_.staging[panel_][k_group][token][channel], cta, split());
          sum.x += part.x;
          sum.y += part.y;
          sum.z += part.z;
          sum.w += part.w;
        }
      }
      const int token_in_tile = chunk * Tile::kChunkTokens + token;
      finish(sum, first_token_ + token_in_tile, shared_.token_scale[panel_][token_in_tile]);
    }
  }

  CUTE_DEVICE void finish(int4 sum, int m, float token_scale) const {
    const int count = params_.n - first_channel_;
    const bool aligned = params_.y_stride % kChannelsPerThread == 0;
    const int64_t at = m * params_.y_stride + first_channel_;
    const int sums[4] = {sum.x, sum.y, sum.z, sum.w};
    if (params_.y_type == Element::kInt32)
      return store_row(static_cast<int*>(params_.y) + at, sums, count, aligned);

    const int channel = thread_ % kThreadsPerToken * kChannelsPerThread;
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
  int cta_rank_, panel_, thread_;
  uint32_t phase_ = 0;
  int first_token_ = 0, first_channel_ = 0;
  float channel_value_;
  float token_scale_[kScalesPerThread];
};

}  // namespace liquidgemm
