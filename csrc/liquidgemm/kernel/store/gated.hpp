// An epilogue that can end in a gated activation: h = act(gate) * up, of half as many channels.
//
// The rows of the weight are interleaved by eights. A thread, which has the channels g and g + 8 of
// 16 (octets.hpp), then has the gate and the up of one output; a warp has 8 channels of h, and a
// panel 32. Both are rounded to the type of y first, as if they had been stored.
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "liquidgemm/common/activation.hpp"
#include "liquidgemm/kernel/epilogue.hpp"
#include "liquidgemm/kernel/store/gated_pair.hpp"

namespace liquidgemm {

// `gated` of common/activation.hpp in fp32, to the bit, with an activation that is known at run
// time: they differ in what they make of their operands, and the long part is there once.
CUTE_DEVICE float gated_at_run_time(GatedActivation activation, float gate, float up) {
  float exponent = -gate;
  if (activation == GatedActivation::kSwigluClamped) {
    gate = gate > kSwigluLimit ? kSwigluLimit : gate;
    exponent = rounded::multiply(-kSwigluAlpha, gate);
    up = swiglu_up(up);
  } else if (activation == GatedActivation::kGeluTanhMul) {
    exponent = gelu_exponent(gate);
  }
  return rounded::multiply(rounded::divide(gate, one_plus_exp(exponent)), up);
}

template <class Tile>
class GatedEpilogue : public Epilogue<Tile> {
  using Base = Epilogue<Tile>;
  using ChannelValues = typename OutputTile<Tile>::ChannelValues;
  using Sums = ClusterSums<Tile>;
  static constexpr int kRowBytes = kBlockRows;  // of a panel: 32 channels of 16 bits
  static constexpr int kVectors = kRowBytes / 16;

 public:
  using Base::Base;

  template <class Scheduler, class Accumulator>
  CUTE_DEVICE void store(Scheduler const& scheduler, Accumulator& acc, int k_group) {
    if (!scheduler.gated())
      return Base::store(scheduler, acc, k_group);
    this->begin_store(scheduler);
    const GatedActivation gate = scheduler.gate();
    if constexpr (!Tile::kPairs) {
      const auto sums_of_group = this->sums().complete(scheduler.item(), acc, k_group);
      if (this->out_.params.y_type == Element::kBFloat16) {
        store_columns<__nv_bfloat162>(gate, sums_of_group, k_group);
      } else if (this->out_.params.y_type == Element::kFloat16) {
        store_columns<__half2>(gate, sums_of_group, k_group);
      } else {
        store_turns(gate, sums_of_group, k_group);
      }
      this->sums().release(scheduler.is_last());
    } else {
      panel_barrier<Tile>(this->out_.panel);  // the scales
      if (this->out_.params.y_type == Element::kBFloat16) {
        store_rows<__nv_bfloat162>(gate, acc);
      } else if (this->out_.params.y_type == Element::kFloat16) {
        store_rows<__half2>(gate, acc);
      } else {
        store_octets(gate, acc);
      }
    }
  }

 private:
  CUTE_DEVICE static int warp() { return threadIdx.x % kWarpGroupThreads / 32; }
  CUTE_DEVICE int first_output() const { return this->out_.first_channel / 2; }
  CUTE_DEVICE int outputs() const { return this->out_.sizes.n / 2; }

  // Of each octet two tokens of a channel of h; sum(i) is that of the octet first + i.
  template <class Pair, int kOctets, class Sum>
  CUTE_DEVICE cute::array<uint32_t, kOctets> activate(GatedActivation gate,
                                                      int first,
                                                      Sum const& sum,
                                                      ChannelValues const& channels) const {
    cute::array<uint32_t, kOctets> gates, ups;
    CUTE_UNROLL
    for (int i = 0; i < kOctets; ++i) {
      const auto words = this->out_.template round_octet<Pair>(first + i, sum(i), channels);
      gates[i] = words[0], ups[i] = words[1];
    }
    gate_pairs<Pair>(gate, gates, ups);
    return gates;
  }

  // As store_rows of rows.hpp, with rows of half the length.
  template <class Pair, class Accumulator>
  CUTE_DEVICE void store_rows(GatedActivation gate, Accumulator const& acc) {
    constexpr int kChunk = Tile::kChunkTokens;
    constexpr int kOctets = kChunk / 8;
    static_assert(kOctets == 2 || kOctets == 4);
    const ChannelValues channels = this->out_.channel_values();
    // Every eight lanes address the rows of an octet.
    const int lane = threadIdx.x % 32;
    const int stage_at = lane * kRowBytes + swizzled(warp(), lane);
    const RowStore rows(*this);
    CUTE_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      if (chunk * kChunk >= this->out_.tokens)
        break;
      uint8_t* const buffer = this->out_.shared.staging[this->out_.panel] +
                              chunk % Tile::kChunkBuffers * Tile::kChunkBytes;
      const int first = chunk * kOctets;
      const auto words = activate<Pair, kOctets>(
          gate, first, [&](int i) { return octet_of(acc, first + i); }, channels);
      auto& to = *reinterpret_cast<cute::uint128_t*>(&buffer[stage_at]);
      if constexpr (kOctets == 4) {
        cute::SM90_U16x8_STSM_T::copy(words[0], words[1], words[2], words[3], to);
      } else {
        cute::SM90_U16x4_STSM_T::copy(words[0], words[1], to);
      }
      if constexpr (Tile::kStoresByTma) {
        cute::tma_store_fence();
        if (this->out_.thread() == 0)  // the buffer of the next chunk has been read
          cute::tma_store_wait<Tile::kChunkBuffers - 2>();
      }
      panel_barrier<Tile>(this->out_.panel);
      const bool clipped = (chunk + 1) * kChunk <= this->out_.tokens ||
                           this->out_.first_token + this->out_.tokens == this->out_.sizes.m;
      if (Tile::kStoresByTma && clipped) {
        if (this->out_.thread() == 0) {
          cute::SM90_TMA_STORE_2D::copy(&this->map_, buffer, first_output(),
                                        this->out_.first_token + chunk * kChunk);
          cute::tma_store_arrive();
        }
      } else {
        rows.store(buffer, chunk * kChunk);
      }
    }
  }

  // TMA's swizzle of rows of 64 bytes.
  CUTE_DEVICE static int swizzled(int vector, int row) { return (vector ^ row / 2 % 4) * 16; }

  // Without TMA: four threads write the 32 channels of a token, 32 tokens at a time.
  class RowStore {
    static constexpr int kRows = kWarpGroupThreads / kVectors;

   public:
    CUTE_DEVICE explicit RowStore(GatedEpilogue const& e) : row_bytes_(e.out_.params.y_stride * 2) {
      const int row = e.out_.thread() / kVectors, vector = e.out_.thread() % kVectors;
      const int channel = e.first_output() + vector * 8;
      const bool stores = channel < e.outputs() && row < Tile::kChunkTokens;
      rows_ = stores ? e.out_.tokens - row : 0;
      staged_at_ = row * kRowBytes + swizzled(vector, row);
      y_ = static_cast<uint8_t*>(e.out_.params.y) + (e.out_.first_token + row) * row_bytes_ +
           channel * 2;
    }

    CUTE_DEVICE void store(uint8_t const* buffer, int first_token) const {
      static_assert(Tile::kChunkTokens <= kRows);
      if (first_token < rows_) {
        *reinterpret_cast<uint4*>(y_ + first_token * row_bytes_) =
            *reinterpret_cast<uint4 const*>(&buffer[staged_at_]);
      }
    }

   private:
    uint8_t* y_;
    int64_t row_bytes_;
    int rows_, staged_at_;
  };

  // As store_columns of columns.hpp: four threads write eight channels of a token.
  template <class Pair>
  CUTE_DEVICE void store_columns(GatedActivation gate,
                                 typename Sums::Octets const& sums_of_group,
                                 int k_group) const {
    const ChannelValues channels = this->out_.channel_values();
    const int lane = threadIdx.x % 32;
    const int channel = first_output() + warp() * 8;
    CUTE_UNROLL
    for (int turn = 0; turn < Sums::kTurns; ++turn) {
      if (!this->sums().owns(turn, k_group))
        continue;
      const int octet = Sums::octet_of_turn(turn, k_group);
      const auto words =
          activate<Pair, 1>(gate, octet, [&](int) { return sums_of_group[turn]; }, channels);
      uint32_t transposed;
      cute::SM75_U32x1_MOVM_T::copy(words[0], transposed);
      const int token = 8 * octet + lane / 4;
      if (this->out_.stores(token) && channel < outputs()) {
        uint16_t* const row = static_cast<uint16_t*>(this->out_.params.y) +
                              (this->out_.first_token + token) * this->out_.params.y_stride +
                              channel;
        *reinterpret_cast<uint32_t*>(row + lane % 4 * 2) = transposed;
      }
    }
  }

  // -----------------------------------------------------------------------------------------------
  // fp32, element by element: as elements.hpp.

  CUTE_DEVICE void store_turns(GatedActivation gate,
                               typename Sums::Octets const& sums_of_group,
                               int k_group) const {
    CUTE_UNROLL
    for (int turn = 0; turn < Sums::kTurns; ++turn) {
      if (this->sums().owns(turn, k_group))
        store_octet(gate, Sums::octet_of_turn(turn, k_group), sums_of_group[turn]);
    }
  }

  template <class Accumulator>
  CUTE_DEVICE void store_octets(GatedActivation gate, Accumulator const& acc) const {
    constexpr int kOctets = Tile::kChunkTokens / 8;
    CUTE_NO_UNROLL
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      CUTE_UNROLL
      for (int c = 0; c < Tile::kChunks; ++c) {
        if (c == chunk) {
          CUTE_UNROLL
          for (int i = 0; i < kOctets; ++i)
            *this->sums().staged(i) = octet_of(acc, c * kOctets + i);
        }
      }
      CUTE_NO_UNROLL
      for (int i = 0; i < kOctets; ++i)
        store_octet(gate, chunk * kOctets + i, *this->sums().staged(i));
    }
  }

  CUTE_DEVICE void store_octet(GatedActivation gate, int octet, int4 const& sum) const {
    const ChannelValues channels = this->out_.channel_values();
    const float2 scales = this->out_.token_scales(octet);
    const auto value = [&](int32_t part, float token_scale, int half) {
      return scaled(part, token_scale, channels.scale[half], channels.bias[half]);
    };
    const float h[2] = {
        gated_at_run_time(gate, value(sum.x, scales.x, 0), value(sum.z, scales.x, 1)),
        gated_at_run_time(gate, value(sum.y, scales.y, 0), value(sum.w, scales.y, 1))};
    const int channel = first_output() + warp() * 8 + threadIdx.x % 32 / 4;
    const int token = this->out_.token_of(octet);
    float* const y = static_cast<float*>(this->out_.params.y) +
                     (this->out_.first_token + token) * this->out_.params.y_stride + channel;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (this->out_.stores(token + i) && channel < outputs())
        y[i * this->out_.params.y_stride] = h[i];
    }
  }
};

}  // namespace liquidgemm
