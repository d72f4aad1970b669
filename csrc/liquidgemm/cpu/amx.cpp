// AMX: tiles of 16 rows of 64 bytes. Weights are decoded to bytes, 16 rows (a band) x 64 k to a
// tile; activations are arranged so that a tile holds 64 k of 16 tokens. One instruction multiplies
// the two into a tile of 16 x 16 sums.
#include "liquidgemm/cpu/decode512.hpp"
#include "liquidgemm/cpu/sets.hpp"
#include "liquidgemm/cpu/transpose512.hpp"

namespace liquidgemm::cpu {
namespace {

inline constexpr int kFewestTokens = 9;  // a tile pays from here on, though a part of it is unused
inline constexpr int kTile = 16;         // rows of weights, or tokens
inline constexpr int kTileBytes = 16 * 64;  // of weights or tokens
inline constexpr int kAhead = 4;            // groups that are prefetched ahead

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes[tile] = 64;
      rows[tile] = 16;
    }
  }
};

// The first k of word i of a decoded row: words of the low and the high nibbles alternate.
constexpr int first_k_of_decoded(int i) {
  return first_k(i / 2 * 2) + 32 * (i % 2);
}

// Layout: [tokens / 16][groups][16 words][16 tokens][4 k].
void arrange_tile(int8_t const* rows, int64_t first, Activations const& to) {
  alignas(64) int32_t words[kTile], totals[kTile];
  for (int i = 0; i < kTile; ++i)
    words[i] = first_k_of_decoded(i) / 4;
  const __m512i order = _mm512_load_si512(words), ones = _mm512_set1_epi8(1);
  __m512i sums[kTile];
  for (__m512i& sum : sums)
    sum = _mm512_setzero_si512();
  int8_t* tile = to.x + first * to.groups * kGroup;
  for (int64_t g = 0; g < to.groups; ++g) {
    __m512i x[kTile];
    for (int t = 0; t < kTile; ++t) {
      const __m512i row = _mm512_loadu_si512(rows + (t * to.groups + g) * kGroup);
      sums[t] = _mm512_dpbusd_epi32(sums[t], ones, row);
      x[t] = _mm512_permutexvar_epi32(order, row);
    }
    transpose(x);
    for (int i = 0; i < kTile; ++i)
      _mm512_store_si512(tile + 64 * i, x[i]);
    tile += kTileBytes;
  }
  transpose(sums);
  __m512i total = sums[0];
  for (int i = 1; i < kTile; ++i)
    total = _mm512_add_epi32(total, sums[i]);
  _mm512_store_si512(totals, total);
  memcpy(to.totals + first, totals, sizeof totals);
}

// One band of one block to a tile: row by row, words in the order of first_k_of_decoded.
inline void decode_band(uint8_t const* block, int band, uint8_t* tile) {
  const BandParams params(block + kParams + 4 * kBandChunks * band);
  for (int g = 0; g < kBandChunks; ++g) {
    uint8_t const* const chunk = block + kChunk * (kBandChunks * band + g);
    _mm_prefetch(reinterpret_cast<char const*>(chunk + kAhead * kBlock), _MM_HINT_T0);
    const Avx512Vnni::Codes codes = Avx512Vnni::codes(chunk);
    const __m512i row = _mm512_mask_shuffle_epi32(codes.low, 0xaaaa, codes.high, _MM_PERM_CCAA);
    const __m512i row8 = _mm512_mask_shuffle_epi32(codes.high, 0x5555, codes.low, _MM_PERM_DDBB);
    _mm512_store_si512(tile + 64 * g, decode(row, params.steps[0][g], params.offsets[0][g]));
    _mm512_store_si512(tile + 64 * (g + 8), decode(row8, params.steps[1][g], params.offsets[1][g]));
  }
}

inline constexpr int kStride = kPanelBands * kTileBytes;  // of a group's decoded bands

// Tile registers: sums 0-3, weights 4 and 5, tokens 6 and 7.
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

using TileSums = int32_t[kTile][kTile];  // [row of the weight][token]

inline void store_sums(TileSums* sums) {
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  fence();
}

// 16 tokens of some bands, whose sums are `stride` tiles apart.
template <int Bands>
void store_tile(TileSums const* sums,
                int stride,
                int64_t n,
                Activations const& x,
                int64_t token,
                Output const& out) {
  alignas(64) int32_t rows[kTile][kBand * Bands];  // of tokens
  for (int b = 0; b < Bands; ++b) {
    __m512i of_tokens[kTile];
    for (int i = 0; i < kTile; ++i)
      of_tokens[i] = _mm512_load_si512(sums[stride * b][i]);
    transpose(of_tokens);
    for (int t = 0; t < kTile; ++t) {
      const __m512i total = _mm512_set1_epi32(x.totals[token + t]);
      _mm512_store_si512(rows[t] + kBand * b,
                         _mm512_sub_epi32(of_tokens[t], _mm512_slli_epi32(total, 7)));
    }
  }
  const int64_t last = smaller(token + kTile, out.tokens);
  for (int64_t t = token; t < last; ++t)
    store_row(out, t, n, kBand * Bands, rows[t - token]);
}

// The first 16 tokens times bands [0, Bands) of what `panel` points at. Decodes them, one group
// ahead of the product, into decoded [groups][kPanelBands][kTileBytes], and so reads whole blocks,
// one after the other: memory is the bottleneck here.
template <int Bands>
void multiply_and_decode(uint8_t const* panel,
                         int band,
                         int64_t n,
                         Activations const& x,
                         Output const& out,
                         uint8_t* decoded) {
  const auto decode_group = [&](int64_t g) {
    for (int b = 0; b < Bands; ++b)
      decode_band(panel + g * kBlock, band + b, decoded + g * kStride + b * kTileBytes);
  };
  zero_sums();
  decode_group(0);
  for (int64_t g = 0; g < x.groups; ++g) {
    if (g + 1 < x.groups)
      decode_group(g + 1);
    fence();
    uint8_t const* const weights = decoded + g * kStride;
    _tile_loadd(6, x.x + g * kTileBytes, 64);
    _tile_loadd(4, weights, 64);
    _tile_dpbusd(0, 4, 6);
    if constexpr (Bands > 1) {
      _tile_loadd(5, weights + kTileBytes, 64);
      _tile_dpbusd(1, 5, 6);
    }
    if constexpr (Bands > 2) {
      _tile_loadd(4, weights + 2 * kTileBytes, 64);
      _tile_dpbusd(2, 4, 6);
    }
    if constexpr (Bands > 3) {
      _tile_loadd(5, weights + 3 * kTileBytes, 64);
      _tile_dpbusd(3, 5, 6);
    }
    fence();
  }
  alignas(64) TileSums sums[4];
  store_sums(sums);
  store_tile<Bands>(sums, 1, n, x, 0, out);
}

// Tokens from `token` on, `Tiles` times 16 of them, times `Bands` decoded bands.
template <int Bands, int Tiles>
void multiply_decoded(
    uint8_t const* decoded, int64_t n, Activations const& x, int64_t token, Output const& out) {
  zero_sums();
  int8_t const* const x0 = x.x + token * x.groups * kGroup;
  int8_t const* const x1 = x0 + kTile * x.groups * kGroup;
  fence();
  for (int64_t g = 0; g < x.groups; ++g) {
    uint8_t const* const weights = decoded + g * kStride;
    _tile_loadd(6, x0 + g * kTileBytes, 64);
    _tile_loadd(4, weights, 64);
    _tile_dpbusd(0, 4, 6);
    if constexpr (Tiles > 1) {
      _tile_loadd(7, x1 + g * kTileBytes, 64);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (Bands > 1) {
      _tile_loadd(5, weights + kTileBytes, 64);
      _tile_dpbusd(2, 5, 6);
      if constexpr (Tiles > 1)
        _tile_dpbusd(3, 5, 7);
    }
  }
  alignas(64) TileSums sums[4];
  store_sums(sums);
  for (int tile = 0; tile < Tiles; ++tile)
    store_tile<Bands>(sums + tile, 2, n, x, token + kTile * tile, out);
}

template <int Bands>
void multiply_all_decoded(
    uint8_t const* decoded, int64_t n, Activations const& x, int64_t token, Output const& out) {
  for (; token + 2 * kTile <= x.tokens; token += 2 * kTile)
    multiply_decoded<Bands, 2>(decoded, n, x, token, out);
  if (token < x.tokens)
    multiply_decoded<Bands, 1>(decoded, n, x, token, out);
}

void multiply_by_tiles(uint8_t const* weight,
                       int64_t first,
                       int64_t last,
                       Activations const& x,
                       Output const& out,
                       uint8_t* decoded) {
  constexpr void (*kFirst[])(uint8_t const*, int, int64_t, Activations const&, Output const&,
                             uint8_t*) = {multiply_and_decode<1>, multiply_and_decode<2>,
                                          multiply_and_decode<3>, multiply_and_decode<4>};
  const TileConfig config;
  fence();
  _tile_loadconfig(&config);
  for (int64_t band = first; band < last;) {
    const int64_t panel = band / kPanelBands;
    const int begin = int(band % kPanelBands);
    const int bands = int(smaller(kPanelBands - begin, last - band));
    const int64_t n = kBand * band;
    kFirst[bands - 1](weight + panel * x.groups * kBlock, begin, n, x, out, decoded);
    int b = 0;
    for (; b + 2 <= bands; b += 2)
      multiply_all_decoded<2>(decoded + b * kTileBytes, n + kBand * b, x, kTile, out);
    if (b < bands)
      multiply_all_decoded<1>(decoded + b * kTileBytes, n + kBand * b, x, kTile, out);
    band += bands;
  }
  _tile_release();
}

}  // namespace

Kernels const* amx_kernels() {
  static constexpr Kernels kernels{"amx",
                                   product_by_codes<Avx512Vnni>(),
                                   {kTile, kGroup, kStride, arrange_tile, multiply_by_tiles},
                                   kFewestTokens,
                                   quantize,
                                   rms_norm,
                                   glu,
                                   search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
