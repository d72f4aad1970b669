// The product by codes, for few tokens and for every instruction set. Of one row and group
//
//   sum over k of w8 * x = s * (sum of q * x) + (a - 128) * (sum of x),
//
// and the sum of q * x, of a whole word of 4-bit codes or of four k of 6-bit ones, fits 16 bits, so
// that one widening multiply-add applies s and adds into 32 bits. Nothing is decoded. Sums are
// modulo 2^32: only the last one has to fit.
//
// INT8 weights have neither s nor a: their products are added as they are, by the sets that
// multiply unsigned bytes with 128 added.
//
// In groups of 32, those of the low nibbles and those of the high ones have s, a and a sum of x of
// their own.
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

  // `sums`: of each 64 k.
  TokenTile(Activations const& a, int64_t token, int sums) {
    const int64_t first = token / kTokenTile * kTokenTile;
    width = smaller(kTokenTile, a.tokens - first);
    x = a.x + (first * a.groups + token - first) * kArranged;
    group_sums = a.group_sums + first * a.groups * sums + token - first;
  }
};

// x of a token and group in the order of a chunk's words: 64 bytes for the low nibbles, then 64 for
// the high ones. Layout: [tiles][groups][tokens of the tile][128], and of the sums of x
// [tiles][groups][sums][tokens of the tile].
template <int kSums>
void arrange_for_codes(int8_t const* row, int64_t token, Activations const& to) {
  const TokenTile tile(to, token, kSums);
  uint32_t total = 0;
  for (int64_t g = 0; g < to.groups; ++g) {
    int8_t const* const from = row + g * kGroup;
    int8_t* const x = tile.x + g * tile.width * kArranged;
    for (int half = 0; half < 2; ++half) {
      for (int word = 0; word < kChunk / 4; ++word)
        memcpy(x + kChunk * half + 4 * word, from + 32 * half + first_k(word), 4);
    }
    for (int part = 0; part < kSums; ++part) {
      int32_t sum = 0;
      for (int i = 0; i < kGroup / kSums; ++i)
        sum += from[kGroup / kSums * part + i];
      tile.group_sums[(kSums * g + part) * tile.width] = sum;
      total += uint32_t(sum);
    }
  }
  to.totals[token] = int32_t(total);
}

// How many (s, a) a row of a block has.
template <class Format>
inline constexpr int kSumsOf = 1;
template <>
inline constexpr int kSumsOf<Groups32> = 2;

template <class Format>
inline constexpr bool kHasParams = false;
template <>
inline constexpr bool kHasParams<Groups32> = true;
template <>
inline constexpr bool kHasParams<Nibbles> = true;
template <>
inline constexpr bool kHasParams<SixBits> = true;

template <class Simd>
auto codes_of(Nibbles, uint8_t const* block, int chunk) {
  return Simd::codes(block + kChunk * chunk);
}
template <class Simd>
auto codes_of(Groups32, uint8_t const* block, int chunk) {
  return Simd::codes(block + kChunk * chunk);
}
template <class Simd>
auto codes_of(SixBits, uint8_t const* block, int chunk) {
  return Simd::codes6(block + kChunk * chunk, block + SixBits::kSecond + kChunk / 2 * chunk);
}

// sums[t] += chunk * x[t], of one block.
template <class Simd, class Format, int T>
void add_chunk(typename Simd::Sums (&sums)[T], uint8_t const* block, int chunk, int8_t const* x) {
  if constexpr (kHasParams<Format>) {
    const auto codes = codes_of<Simd>(Format{}, block, chunk);
    const typename Simd::Steps steps = Simd::steps(block + Format::kParams + 4 * chunk);
    if constexpr (kSumsOf<Format> == 2) {
      const typename Simd::Steps high = Simd::steps(block + Format::kHighParams + 4 * chunk);
      for (int t = 0; t < T; ++t)
        sums[t] = Simd::multiply_add(sums[t], codes, x + kArranged * t, steps, high);
    } else {
      for (int t = 0; t < T; ++t)
        sums[t] = Simd::multiply_add(sums[t], codes, x + kArranged * t, steps);
    }
  } else {
    for (int half = 0; half < 2; ++half) {
      const typename Simd::Int8s weights = Simd::int8s(block + kHigh * half + kChunk * chunk);
      for (int t = 0; t < T; ++t)
        sums[t] = Simd::multiply_add(sums[t], weights, x + kArranged * t + kChunk * half);
    }
  }
}

// Tokens [token, token + T) times bands [first, last) of one panel.
template <class Simd, class Format, int T>
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
    const bool is_biased = kHasParams<Format> || Simd::kInt8sAreBiased;
    const int32_t bias = is_biased ? minus_128_times(x.totals[token + t]) : 0;
    for (int row = kBand * first; row < kBand * last; ++row)
      rows[t][row] = bias;
  }
  const TokenTile tile(x, token, kSumsOf<Format>);
  for (int64_t begin = 0; begin < x.groups; begin += kRun) {
    const int64_t end = smaller(begin + kRun, x.groups);
    int8_t const* const x_run = tile.x + begin * tile.width * kArranged;
    uint8_t const* const block_run = panel + begin * Format::kBlock;
    for (int chunk = kBandChunks * first; chunk < kBandChunks * last; ++chunk) {
      typename Simd::Sums run[T];
      for (int t = 0; t < T; ++t)
        run[t] = sums[chunk][t];
      int8_t const* x_group = x_run;
      uint8_t const* block = block_run;
      for (int64_t g = begin; g < end; ++g) {
        __builtin_prefetch(block + kRun * Format::kBlock + kChunk * chunk);
        if constexpr (!kHasParams<Format>)
          __builtin_prefetch(block + kRun * Format::kBlock + kHigh + kChunk * chunk);
        add_chunk<Simd, Format, T>(run, block, chunk, x_group);
        x_group += tile.width * kArranged;
        block += Format::kBlock;
      }
      for (int t = 0; t < T; ++t)
        sums[chunk][t] = run[t];
    }
    if constexpr (kHasParams<Format>) {
      for (int64_t g = begin; g < end; ++g) {
        for (int part = 0; part < kSumsOf<Format>; ++part) {
          int32_t const* const group_sums =
              tile.group_sums + (kSumsOf<Format> * g + part) * tile.width;
          for (int band = first; band < last; ++band) {
            uint8_t const* const params = panel + g * Format::kBlock + Format::kParams +
                                          2 * kPanel * part + 4 * kBandChunks * band;
            for (int t = 0; t < T; ++t)
              Simd::add_offsets(params, group_sums[t], rows[t] + kBand * band);
          }
        }
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
template <class Simd, class Format, int T>
void multiply_codes_of_all(uint8_t const* panel,
                           int64_t n,
                           int first,
                           int last,
                           Activations const& x,
                           int64_t token,
                           Output const& out) {
  for (; token + T <= out.tokens; token += T)
    multiply_codes<Simd, Format, T>(panel, n, first, last, x, token, out);
  if constexpr (T > 1)
    multiply_codes_of_all<Simd, Format, T / 2>(panel, n, first, last, x, token, out);
}

template <class Simd, class Format>
void multiply_by_codes(
    uint8_t const* weight, int64_t first, int64_t last, Activations const& x, Output const& out) {
  for (int64_t band = first; band < last;) {
    const int64_t panel = band / kPanelBands;
    const int begin = int(band % kPanelBands);
    const int end = int(smaller(kPanelBands, last - panel * kPanelBands));
    multiply_codes_of_all<Simd, Format, Simd::kTokens>(weight + panel * x.groups * Format::kBlock,
                                                       panel * kPanel, begin, end, x, 0, out);
    band += end - begin;
  }
}

template <class Simd, class Format = Nibbles>
constexpr Product product_by_codes() {
  return {1, kArranged, arrange_for_codes<kSumsOf<Format>>, multiply_by_codes<Simd, Format>};
}

// By one way for any number of tokens.
constexpr Products always(Product const& product) {
  return {product, product, INT64_MAX};
}

}  // namespace
}  // namespace liquidgemm::cpu
