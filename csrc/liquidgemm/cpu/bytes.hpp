// The product by bytes, for many tokens and instruction sets with a product of four unsigned and
// four signed bytes per 32-bit lane. A band's weights are decoded once, to bytes q * s + a, which
// are 128 too large: 128 times the sum of x is subtracted at the end. Then a product takes one
// instruction where codes take one and a half. Besides what simd.hpp lists, Simd has
//
//   kFewestTokens                     from which on decoding pays
//   kChunksAtOnce                     chunks whose sums are in registers at a time
//   decode(chunk, params, bytes)      to kArranged bytes, in the order of the arranged x
//   load(bytes)                       one register of bytes
//   dot(sums, weights, x)             sums + products of bytes
#pragma once

#include "liquidgemm/cpu/codes.hpp"

namespace liquidgemm::cpu {
namespace {

inline constexpr int kDepth = 16;  // groups whose weights and x stay in the first cache
inline constexpr int kDecodedBand = kBandChunks * kArranged;  // bytes of a group

// T tokens from `token` on, of one tile, times a decoded band [groups][8 chunks][128].
template <class Simd, int T>
void multiply_bytes(
    uint8_t const* decoded, int64_t n, Activations const& x, int64_t token, Output const& out) {
  constexpr int C = Simd::kChunksAtOnce, kWidth = sizeof(typename Simd::Sums);
  typename Simd::Sums sums[kBandChunks][T];
  for (int chunk = 0; chunk < kBandChunks; ++chunk) {
    for (int t = 0; t < T; ++t)
      sums[chunk][t] = Simd::zero();
  }
  const TokenTile tile(x, token);
  for (int64_t begin = 0; begin < x.groups; begin += kDepth) {
    const int64_t end = smaller(begin + kDepth, x.groups);
    for (int chunk = 0; chunk < kBandChunks; chunk += C) {
      typename Simd::Sums run[C][T];
      for (int c = 0; c < C; ++c) {
        for (int t = 0; t < T; ++t)
          run[c][t] = sums[chunk + c][t];
      }
      for (int64_t g = begin; g < end; ++g) {
        uint8_t const* const weights = decoded + g * kDecodedBand + chunk * kArranged;
        int8_t const* const x_group = tile.x + g * tile.width * kArranged;
        for (int at = 0; at < kArranged; at += kWidth) {
          typename Simd::Sums w[C];
          for (int c = 0; c < C; ++c)
            w[c] = Simd::load(weights + c * kArranged + at);
          for (int t = 0; t < T; ++t) {
            const typename Simd::Sums x_part = Simd::load(x_group + t * kArranged + at);
            for (int c = 0; c < C; ++c)
              run[c][t] = Simd::dot(run[c][t], w[c], x_part);
          }
        }
      }
      for (int c = 0; c < C; ++c) {
        for (int t = 0; t < T; ++t)
          sums[chunk + c][t] = run[c][t];
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    alignas(64) int32_t rows[kBand];
    for (int32_t& row : rows)
      row = minus_128_times(x.totals[token + t]);
    Simd::fold(&sums[0][t], T, rows);
    store_row(out, token + t, n, kBand, rows);
  }
}

template <class Simd, int T>
void multiply_bytes_of_all(
    uint8_t const* decoded, int64_t n, Activations const& x, int64_t token, Output const& out) {
  for (; token + T <= out.tokens; token += T)
    multiply_bytes<Simd, T>(decoded, n, x, token, out);
  if constexpr (T > 1)
    multiply_bytes_of_all<Simd, T / 2>(decoded, n, x, token, out);
}

// Whole blocks are decoded one after the other: that is how memory is read fastest.
template <class Simd>
void multiply_by_bytes(uint8_t const* weight,
                       int64_t first,
                       int64_t last,
                       Activations const& x,
                       Output const& out,
                       uint8_t* decoded) {
  for (int64_t band = first; band < last;) {
    const int64_t panel = band / kPanelBands;
    const int begin = int(band % kPanelBands);
    const int bands = int(smaller(kPanelBands - begin, last - band));
    uint8_t const* block = weight + panel * x.groups * kBlock;
    for (int64_t g = 0; g < x.groups; ++g, block += kBlock) {
      for (int b = 0; b < bands; ++b) {
        uint8_t* const to = decoded + (b * x.groups + g) * kDecodedBand;
        for (int i = 0; i < kBandChunks; ++i) {
          const int chunk = (begin + b) * kBandChunks + i;
          __builtin_prefetch(block + 4 * kBlock + kChunk * chunk);
          Simd::decode(block + kChunk * chunk, block + kParams + 4 * chunk, to + i * kArranged);
        }
      }
    }
    for (int b = 0; b < bands; ++b)
      multiply_bytes_of_all<Simd, kTokenTile>(decoded + b * x.groups * kDecodedBand,
                                              kBand * (band + b), x, 0, out);
    band += bands;
  }
}

template <class Simd>
constexpr Product product_by_bytes() {
  return {1, kArranged, kPanelBands * kDecodedBand, arrange_for_codes, multiply_by_bytes<Simd>};
}

}  // namespace
}  // namespace liquidgemm::cpu
