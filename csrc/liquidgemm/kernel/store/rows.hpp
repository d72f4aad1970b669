// Results of 16 bits, a chunk of tokens at a time: transposed by stmatrix in shared memory, then
// stored by TMA, or so that eight threads write the 64 channels of a token.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "liquidgemm/kernel/protocol.hpp"
#include "liquidgemm/kernel/store/output_tile.hpp"

namespace liquidgemm {

// Where a vector of 16 bytes lies in a row of 128, by TMA's swizzle.
CUTE_DEVICE int swizzled(int vector, int row) {
  return (vector ^ row % 8) * 16;
}

// A thread's results of a chunk of tokens, two to a word: for every octet two words, of its two
// channels.
template <int kTokens>
using Rounded = cute::array<uint32_t, kTokens / 4>;

template <class Pair, class Tile, class Accumulator>
CUTE_DEVICE auto round_chunk(OutputTile<Tile> const& out,
                             Accumulator const& acc,
                             int chunk,
                             typename OutputTile<Tile>::ChannelValues const& channels) {
  constexpr int kOctets = Tile::kChunkTokens / 8;
  Rounded<Tile::kChunkTokens> rounded;
  CUTE_UNROLL
  for (int i = 0; i < kOctets; ++i) {
    const int octet = chunk * kOctets + i;
    const auto words = out.template round_octet<Pair>(octet, octet_of(acc, octet), channels);
    rounded[2 * i] = words[0];
    rounded[2 * i + 1] = words[1];
  }
  return rounded;
}

// Without TMA: eight threads write the 64 channels of a token, sixteen tokens at a time.
template <class Tile>
class DirectRows {
  static constexpr int kRowBytes = kBlockRows * 2;
  static constexpr int kRows = kWarpGroupThreads / (kRowBytes / 16);

 public:
  CUTE_DEVICE explicit DirectRows(OutputTile<Tile> const& out)
      : row_bytes_(out.params.y_stride * 2) {
    const int row = out.thread() / (kRowBytes / 16), vector = out.thread() % (kRowBytes / 16);
    const int channel = out.first_channel + vector * 8;
    rows_ = channel < out.sizes.n ? out.tokens - row : 0;
    staged_at_ = row * kRowBytes + swizzled(vector, row);
    y_ = static_cast<uint8_t*>(out.params.y) + (out.first_token + row) * row_bytes_ + channel * 2;
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

// With TMA a chunk is on its way while the next tile is computed.
template <class Pair, class Tile, class Accumulator>
CUTE_DEVICE void store_rows(OutputTile<Tile> const& out,
                            CUtensorMap const& map,
                            Accumulator const& acc) {
  constexpr int kChunk = Tile::kChunkTokens;
  constexpr int kRowBytes = kBlockRows * 2;
  const auto channels = out.channel_values();
  // stmatrix takes the address of a row of 16 bytes from every lane: lanes 0-7 and 8-15 those of
  // the tokens of an octet, for the upper and the lower eight channels; 16-31 of the next octet.
  // The swizzle of TMA keeps them free of bank conflicts.
  const int lane = threadIdx.x % 32;
  const int stage_at =
      (lane / 16 * 8 + lane % 8) * kRowBytes + swizzled(out.thread() / 32 * 2 + lane / 8 % 2, lane);
  const DirectRows<Tile> rows(out);
  // One chunk is on its way to shared memory and out of it while the next one is rounded.
  Rounded<kChunk> rounded = round_chunk<Pair>(out, acc, 0, channels);
  CUTE_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    if (chunk * kChunk >= out.tokens)
      break;
    const int turn = out.split() ? chunk / 2 : chunk;
    uint8_t* const buffer =
        out.shared.staging[out.panel] + turn % Tile::kChunkBuffers * Tile::kChunkBytes;
    if (owns(out.ownership, chunk)) {
      CUTE_UNROLL
      for (int i = 0; i < kChunk / 16; ++i) {
        cute::SM90_U16x8_STSM_T::copy(
            rounded[4 * i], rounded[4 * i + 1], rounded[4 * i + 2], rounded[4 * i + 3],
            *reinterpret_cast<cute::uint128_t*>(&buffer[stage_at + i * 16 * kRowBytes]));
      }
    }
    if (chunk + 1 < Tile::kChunks && owns(out.ownership, chunk + 1))
      rounded = round_chunk<Pair>(out, acc, chunk + 1, channels);
    if (owns(out.ownership, chunk)) {
      if constexpr (Tile::kStoresByTma) {
        cute::tma_store_fence();
        if (out.thread() == 0)  // the buffer of the next chunk has been read
          cute::tma_store_wait<Tile::kChunkBuffers - 2>();
      }
      panel_barrier<Tile>(out.panel);
      // TMA clips rows past the end of x alone: a chunk that reaches into the next tile's rows is
      // stored row by row.
      const bool clipped =
          (chunk + 1) * kChunk <= out.tokens || out.first_token + out.tokens == out.sizes.m;
      if (Tile::kStoresByTma && clipped) {
        if (out.thread() == 0) {
          cute::SM90_TMA_STORE_2D::copy(&map, buffer, out.first_channel,
                                        out.first_token + chunk * kChunk);
          cute::tma_store_arrive();
        }
      } else {
        rows.store(buffer, chunk * kChunk);
      }
    }
  }
}

}  // namespace liquidgemm
