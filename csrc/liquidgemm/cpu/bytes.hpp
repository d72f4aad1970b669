// The product by bytes, for many tokens. Weights are decoded once for up to 64 tokens: to bytes
// q * s + a, which are 128 too large, where a set has a product of four unsigned and four signed
// bytes per 32-bit lane; AVX2 decodes to codes alone.
//
// A chunk's words become lanes that belong to one row each (a band: 16 rows), so that a word of x
// is broadcast to all of them and no sum has to be folded. What a product reads lies in the first
// cache: a few groups of decoded weights, as many of x, and the sums.
//
// Besides what simd.hpp lists, Simd has
//
//   kDecodedBand                              bytes of a decoded band of one group
//   kDepthOfMost                              kDepth for kMostTokens tokens
//   decode_band(chunks, params, to)           of one group: [k / 4][16 lanes][4 k] bytes first
//   decode_band32(chunks, params, high_params, to)
//                                             the same of groups of 32
//   decode_band6(chunks, second, params, to)  the same of 6-bit codes
//   arrange_band(chunks, to)                  the same of INT8 weights, with 128 added; AVX2: two
//                                             codes of each
//   kToken                                    bytes of a token and group: 64 k first
//   arrange(rows, first, to)                  arrange_tile, and what comes behind the 64 k
//   multiply(bands, weights, x, tokens, depth, sums)
//                                             sums[token][lane] += products of `depth` groups
//   steps_of(bands, tokens)                   calls of Part::multiply for some tokens of a panel
//   sum(row, count)                           of int8, a multiple of 64
#pragma once

#include <type_traits>

#include "liquidgemm/cpu/codes.hpp"

namespace liquidgemm::cpu {
namespace {

inline constexpr int kTile = 16;                   // tokens that lie next to each other
inline constexpr int kTileBytes = kTile * kGroup;  // of a group: of a tile of tokens, or of a band
inline constexpr int kDepth = 4;                   // groups that are decoded at a time
inline constexpr int kMostTokens = 64;             // at a time
inline constexpr int kMostOfPart = 6;  // tokens of a tile whose sums are held in registers

// The row of a band that lane i belongs to, as in a chunk: g and g + 8 alternate.
constexpr int row_of_lane(int i) {
  return i / 2 + 8 * (i % 2);
}

// Where the register with word pair `pair` of all chunks goes, by its k: of the low nibbles.
constexpr int quad_of_pair(int pair) {
  return first_k(2 * pair) / 4;
}

// Where a tile's x of a group begins. Layout: [tokens / 16][groups][16 tokens][Simd::kToken].
template <class Simd>
int8_t* tile_x(Activations const& x, int64_t token, int64_t group) {
  return x.x + (token / kTile * x.groups + group) * kTile * Simd::kToken;
}

template <class Simd>
void arrange_tile(int8_t const* rows, int64_t first, Activations const& to) {
  const int64_t columns = to.groups * kGroup;
  for (int t = 0; t < kTile; ++t) {
    int8_t const* const row = rows + t * columns;
    for (int64_t g = 0; g < to.groups; ++g)
      memcpy(tile_x<Simd>(to, first, g) + t * Simd::kToken, row + g * kGroup, kGroup);
    to.totals[first + t] = Simd::sum(row, columns);
  }
}

// Some tokens of a panel, and where their sums are: [token][lane].
struct Place {
  uint8_t const* panel;
  int begin, bands;  // of the panel
  int64_t token;
  int tokens;

  template <class Format>
  uint8_t const* block(int64_t group) const {
    return panel + group * Format::kBlock;
  }
};

using PanelSums = int32_t[kMostTokens][kPanel];

inline void start_sums(Place const& at, Activations const& x, PanelSums& sums) {
  for (int t = 0; t < (at.tokens + kTile - 1) / kTile * kTile; ++t) {
    const int32_t bias = minus_128_times(x.totals[at.token + t]);
    for (int lane = 0; lane < kBand * at.bands; ++lane)
      sums[t][lane] = bias;
  }
}

inline void store_sums(Place const& at, int64_t n, PanelSums const& sums, Output const& out) {
  for (int t = 0; t < at.tokens; ++t) {
    alignas(64) int32_t rows[kPanel];
    for (int b = 0; b < at.bands; ++b) {
      for (int i = 0; i < kBand; ++i)
        rows[kBand * b + row_of_lane(i)] = sums[t][kBand * b + i];
    }
    store_row(out, at.token + t, n, kBand * at.bands, rows);
  }
}

// Band b of those at a place, of one group.
template <class Simd, class Format>
void decode_band_at(Place const& at, int64_t group, int b, uint8_t* to) {
  uint8_t const* const block = at.block<Format>(group);
  const int chunk = kBandChunks * (at.begin + b);
  if constexpr (std::is_same_v<Format, SixBits>)
    Simd::decode_band6(block + kChunk * chunk, block + Format::kSecond + kChunk / 2 * chunk,
                       block + Format::kParams + 4 * chunk, to);
  else if constexpr (std::is_same_v<Format, Groups32>)
    Simd::decode_band32(block + kChunk * chunk, block + Format::kParams + 4 * chunk,
                        block + Format::kHighParams + 4 * chunk, to);
  else if constexpr (kHasParams<Format>)
    Simd::decode_band(block + kChunk * chunk, block + Format::kParams + 4 * chunk, to);
  else
    Simd::arrange_band(block + kChunk * chunk, to);
}

// Memory that is asked for in equal steps while something else is done.
struct Lines {
  uint8_t const* next;
  int count;  // in a step

  void step() {
    for (int i = 0; i < count; ++i)
      __builtin_prefetch(next + kChunk * i);
    next += kChunk * count;
  }
};

// Calls of Part::multiply for some tokens of a panel: each tile is divided by itself.
constexpr int parts_of(int tokens) {
  constexpr int kPartsOfTile = (kTile + kMostOfPart - 1) / kMostOfPart;
  return tokens / kTile * kPartsOfTile + (tokens % kTile + kMostOfPart - 1) / kMostOfPart;
}

// Some tokens of a tile, in parts that are as equal as can be, of at most T tokens.
template <class Part, int T = kMostOfPart>
void multiply_parts(uint8_t const* weights,
                    int8_t const* x,
                    int tokens,
                    int depth,
                    int32_t* sums,
                    Lines& ahead,
                    int parts = 0) {
  if (parts == 0)
    parts = (tokens + T - 1) / T;
  if constexpr (T > 1) {
    if ((tokens + parts - 1) / parts < T)
      return multiply_parts<Part, T - 1>(weights, x, tokens, depth, sums, ahead, parts);
  }
  Part::template multiply<T>(weights, x, depth, sums, ahead);
  if (tokens > T)
    multiply_parts<Part, T>(weights, x + Part::kToken * T, tokens - T, depth, sums + kPanel * T,
                            ahead, parts - 1);
}

// kGroups are decoded at a time. Not inlined: the larger of two buffers would lie beneath the sums
// of few tokens as well, which takes a tenth of the time again.
template <class Simd, class Format, int kGroups>
[[gnu::noinline]] void multiply_bytes(Place const& at,
                                      int64_t n,
                                      Activations const& x,
                                      Output const& out) {
  constexpr int kDecodedGroup = kPanelBands * Simd::kDecodedBand;
  alignas(64) uint8_t decoded[kGroups * kDecodedGroup];
  alignas(64) PanelSums sums;
  start_sums(at, x, sums);
  const int steps = kGroups * Simd::steps_of(at.bands, at.tokens);
  for (int64_t g = 0; g < x.groups; g += kGroups) {
    const int depth = int(smaller(kGroups, x.groups - g));
    for (int d = 0; d < depth; ++d) {
      for (int b = 0; b < at.bands; ++b)
        decode_band_at<Simd, Format>(at, g + d, b,
                                     decoded + d * kDecodedGroup + b * Simd::kDecodedBand);
    }
    Lines ahead{at.block<Format>(g + kGroups),
                (kGroups * Format::kBlock / kChunk + steps - 1) / steps};
    for (int t = 0; t < at.tokens; t += kTile)
      Simd::multiply(at.bands, decoded, tile_x<Simd>(x, at.token + t, g),
                     int(smaller(kTile, at.tokens - t)), depth, sums[t], ahead);
  }
  store_sums(at, n, sums, out);
}

template <class Simd, class Format>
void multiply_by_bytes(
    uint8_t const* weight, int64_t first, int64_t last, Activations const& x, Output const& out) {
  for (int64_t band = first; band < last;) {
    const int64_t panel = band / kPanelBands;
    const int begin = int(band % kPanelBands);
    const int bands = int(smaller(kPanelBands - begin, last - band));
    for (int64_t token = 0; token < out.tokens; token += kMostTokens) {
      const Place at{weight + panel * x.groups * Format::kBlock, begin, bands, token,
                     int(smaller(kMostTokens, out.tokens - token))};
      if (at.tokens == kMostTokens)
        multiply_bytes<Simd, Format, Simd::kDepthOfMost>(at, kBand * band, x, out);
      else
        multiply_bytes<Simd, Format, kDepth>(at, kBand * band, x, out);
    }
    band += bands;
  }
}

template <class Simd, class Format = Nibbles>
constexpr Product product_by_bytes() {
  return {kTile, Simd::kToken, Simd::arrange, multiply_by_bytes<Simd, Format>};
}

template <class Simd, class Format>
constexpr Products products(int64_t fewest_many) {
  return {product_by_codes<Simd, Format>(), product_by_bytes<Simd, Format>(), fewest_many};
}

}  // namespace
}  // namespace liquidgemm::cpu
