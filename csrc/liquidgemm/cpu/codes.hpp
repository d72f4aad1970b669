// The product by codes, for few tokens and for every instruction set. Of one row and group
//
//   sum over k of w8 * x = s * (sum of q * x) + (a - 128) * (sum of x),
//
// and the sum of q * x, of 4-bit codes, fits 16 bits, so that one widening multiply-add applies s
// and adds into 32 bits. Nothing is decoded. Sums are modulo 2^32: only the last one has to fit.
#pragma once

#include "liquidgemm/cpu/epilogue.hpp"
#include "liquidgemm/cpu/rows.hpp"
#include "liquidgemm/cpu/search.hpp"

namespace liquidgemm::cpu {
namespace {

// Groups that are added up in a register before the sums of the next chunk are taken.
inline constexpr int kRun = 8;

// Modulo 2^32.
inline int32_t minus_128_times(int32_t total) {
  return int32_t(uint32_t(total) * uint32_t(-128));
}

// Tokens whose groups lie next to each other: a tile. The last tile of all may have fewer.
inline constexpr int kTokenTile = 8;

struct TokenTile {
  int8_t* x;            // of the token that was asked for, in group 0
  int32_t* group_sums;  // likewise
  int64_t width;        // tokens of the tile: the distance of one group from the next

  TokenTile(Activations const& a, int64_t token) {
    const int64_t first = token / kTokenTile * kTokenTile;
    width = smaller(kTokenTile, a.tokens - first);
    const int64_t at = first * a.groups + token - first;
    x = a.x + at * kArranged;
    group_sums = a.group_sums + at;
  }
};

// x of a token and group in the order of a chunk's words: 64 bytes for the low nibbles, then 64 for
// the high ones. Layout: [tiles][groups][tokens of the tile][128].
inline void arrange_for_codes(int8_t const* row, int64_t token, Activations const& to) {
  const TokenTile tile(to, token);
  uint32_t total = 0;
  for (int64_t g = 0; g < to.groups; ++g) {
    int8_t const* const from = row + g * kGroup;
    int8_t* const x = tile.x + g * tile.width * kArranged;
    for (int half = 0; half < 2; ++half) {
      for (int word = 0; word < kChunk / 4; ++word)
        memcpy(x + kChunk * half + 4 * word, from + 32 * half + first_k(word), 4);
    }
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i)
      sum += from[i];
    tile.group_sums[g * tile.width] = sum;
    total += uint32_t(sum);
  }
  to.totals[token] = int32_t(total);
}

// Tokens [token, token + T) times bands [first, last) of one panel.
template <class Simd, int T>
void multiply_codes(uint8_t const* panel,
                    int64_t n,
                    int first,
                    int last,
                    Activations const& x,
                    int64_t token,
                    Output const& out) {
  typename Simd::Sums sums[kPanelChunks][T];
  alignas(64) int32_t rows[T][kPanel];
  for (int chunk = kBandChunks * first; chunk < kBandChunks * last; ++chunk) {
    for (int t = 0; t < T; ++t)
      sums[chunk][t] = Simd::zero();
  }
  for (int t = 0; t < T; ++t) {
    const int32_t bias = minus_128_times(x.totals[token + t]);
    for (int row = kBand * first; row < kBand * last; ++row)
      rows[t][row] = bias;
  }
  const TokenTile tile(x, token);
  for (int64_t begin = 0; begin < x.groups; begin += kRun) {
    const int64_t end = smaller(begin + kRun, x.groups);
    int8_t const* const x_run = tile.x + begin * tile.width * kArranged;
    uint8_t const* const block_run = panel + begin * kBlock;
    for (int chunk = kBandChunks * first; chunk < kBandChunks * last; ++chunk) {
      typename Simd::Sums run[T];
      for (int t = 0; t < T; ++t)
        run[t] = sums[chunk][t];
      int8_t const* x_group = x_run;
      uint8_t const* block = block_run;
      for (int64_t g = begin; g < end; ++g) {
        __builtin_prefetch(block + kRun * kBlock + kChunk * chunk);
        const typename Simd::Codes codes = Simd::codes(block + kChunk * chunk);
        const typename Simd::Steps steps = Simd::steps(block + kParams + 4 * chunk);
        for (int t = 0; t < T; ++t)
          run[t] = Simd::multiply_add(run[t], codes, x_group + kArranged * t, steps);
        x_group += tile.width * kArranged;
        block += kBlock;
      }
      for (int t = 0; t < T; ++t)
        sums[chunk][t] = run[t];
    }
    for (int64_t g = begin; g < end; ++g) {
      int32_t const* const group_sums = tile.group_sums + g * tile.width;
      for (int band = first; band < last; ++band) {
        uint8_t const* const params = panel + g * kBlock + kParams + 4 * kBandChunks * band;
        for (int t = 0; t < T; ++t)
          Simd::add_offsets(params, group_sums[t], rows[t] + kBand * band);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int band = first; band < last; ++band)
      Simd::fold(&sums[kBandChunks * band][t], T, rows[t] + kBand * band);
    store_row(out, token + t, n + kBand * first, kBand * (last - first), rows[t] + kBand * first);
  }
}

// All tokens from `token` on, T at a time, then fewer.
template <class Simd, int T>
void multiply_codes_of_all(uint8_t const* panel,
                           int64_t n,
                           int first,
                           int last,
                           Activations const& x,
                           int64_t token,
                           Output const& out) {
  for (; token + T <= out.tokens; token += T)
    multiply_codes<Simd, T>(panel, n, first, last, x, token, out);
  if constexpr (T > 1)
    multiply_codes_of_all<Simd, T / 2>(panel, n, first, last, x, token, out);
}

template <class Simd>
void multiply_by_codes(
    uint8_t const* weight, int64_t first, int64_t last, Activations const& x, Output const& out) {
  for (int64_t band = first; band < last;) {
    const int64_t panel = band / kPanelBands;
    const int begin = int(band % kPanelBands);
    const int end = int(smaller(kPanelBands, last - panel * kPanelBands));
    multiply_codes_of_all<Simd, Simd::kTokens>(weight + panel * x.groups * kBlock, panel * kPanel,
                                               begin, end, x, 0, out);
    band += end - begin;
  }
}

template <class Simd>
constexpr Product product_by_codes() {
  return {1, kArranged, arrange_for_codes, multiply_by_codes<Simd>};
}

}  // namespace
}  // namespace liquidgemm::cpu
