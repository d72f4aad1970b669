// AMX: tiles of 16 rows of 64 bytes. A tile of x is 16 tokens x 64 k, one of weights is a decoded
// band: words of 16 rows, for each of 16 quads of k. One instruction multiplies the two into a tile
// of 16 x 16 sums.
#include "liquidgemm/cpu/avx512_vnni.hpp"
#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {
namespace {

// What has been written is in memory, and what is read comes from there. GCC's tile loads and
// stores are assembly that does not say which memory it touches.
inline void fence() {
  __asm__ volatile("" ::: "memory");
}

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

inline constexpr int kSumStride = kPanel * int(sizeof(int32_t));

// What is read ahead with every band that is decoded. One pass over a panel waits for memory, and
// reads the next block into the first cache. Several passes have time for the whole next panel, and
// read it into the second one.
struct Ahead {
  uint8_t const* panel = nullptr;  // the rest of the next panel, or null
  int lines = 0;                   // of it

  template <class Format>
  void step(uint8_t const* chunks) {
    if (panel == nullptr) {
      for (int i = 0; i < kBandChunks; ++i) {
        __builtin_prefetch(chunks + Format::kBlock + kChunk * i);
        if constexpr (!kHasParams<Format>)
          __builtin_prefetch(chunks + Format::kBlock + kHigh + kChunk * i);
      }
      return;
    }
    for (int i = 0; i < lines; ++i)
      __builtin_prefetch(panel + kChunk * i, 0, 2);
    panel += kChunk * lines;
  }
};

// One group after the other of some bands, decoded while the tiles of the group before it are
// multiplied, which another unit of the core does.
template <class Format>
struct Decoder {
  Place const& at;
  Ahead& ahead;
  int64_t groups, group = 0;
  alignas(64) uint8_t bytes[2][kPanelBands * kTileBytes];

  Decoder(Place const& at, Ahead& ahead, int64_t groups) : at(at), ahead(ahead), groups(groups) {}

  uint8_t const* decoded(int64_t g) const { return bytes[g % 2]; }

  template <int Bands>
  void step() {
    if (group == groups)
      return;
    for (int b = 0; b < Bands; ++b) {
      ahead.template step<Format>(at.block<Format>(group) + kChunk * kBandChunks * (at.begin + b));
      decode_band_at<Avx512Vnni, Format>(at, group, b, bytes[group % 2] + b * kTileBytes);
    }
    ++group;
  }
};

// One tile of tokens times up to 4 bands. Tile registers: sums 0-3, weights 4 and 5, tokens 6
// and 7.
template <class Format, int Bands>
void multiply_tile(Place const& at, Activations const& x, PanelSums& sums, Ahead& ahead) {
  Decoder<Format> decoder(at, ahead, x.groups);
  decoder.template step<Bands>();
  int8_t const* tokens = x.x + at.token * x.groups * kGroup;
  int32_t* const to = sums[0];
  fence();
  _tile_loadd(0, to, kSumStride);
  if constexpr (Bands > 1)
    _tile_loadd(1, to + kBand, kSumStride);
  if constexpr (Bands > 2)
    _tile_loadd(2, to + 2 * kBand, kSumStride);
  if constexpr (Bands > 3)
    _tile_loadd(3, to + 3 * kBand, kSumStride);
  for (int64_t g = 0; g < x.groups; ++g) {
    uint8_t const* const weights = decoder.decoded(g);
    decoder.template step<Bands>();
    fence();
    _tile_loadd(6, tokens, 64);
    _tile_loadd(4, weights, 64);
    _tile_dpbsud(0, 6, 4);
    if constexpr (Bands > 1) {
      _tile_loadd(5, weights + kTileBytes, 64);
      _tile_dpbsud(1, 6, 5);
    }
    if constexpr (Bands > 2) {
      _tile_loadd(4, weights + 2 * kTileBytes, 64);
      _tile_dpbsud(2, 6, 4);
    }
    if constexpr (Bands > 3) {
      _tile_loadd(5, weights + 3 * kTileBytes, 64);
      _tile_dpbsud(3, 6, 5);
    }
    fence();
    tokens += kTileBytes;
  }
  _tile_stored(0, to, kSumStride);
  if constexpr (Bands > 1)
    _tile_stored(1, to + kBand, kSumStride);
  if constexpr (Bands > 2)
    _tile_stored(2, to + 2 * kBand, kSumStride);
  if constexpr (Bands > 3)
    _tile_stored(3, to + 3 * kBand, kSumStride);
  fence();
}

// Two tiles of tokens times up to 2 bands. To decode a band again for the next two tiles is faster
// than to keep it: stores to the second cache take 4 clocks per line, and tile loads from there 25.
template <class Format, int Bands>
void multiply_tiles(Place const& at, Activations const& x, PanelSums& sums, Ahead& ahead) {
  Decoder<Format> decoder(at, ahead, x.groups);
  decoder.template step<Bands>();
  int8_t const* tokens = x.x + at.token * x.groups * kGroup;
  int8_t const* later = tokens + x.groups * kTileBytes;
  int32_t *const to = sums[0], *const to_later = sums[kTile];
  fence();
  _tile_loadd(0, to, kSumStride);
  _tile_loadd(1, to_later, kSumStride);
  if constexpr (Bands > 1) {
    _tile_loadd(2, to + kBand, kSumStride);
    _tile_loadd(3, to_later + kBand, kSumStride);
  }
  for (int64_t g = 0; g < x.groups; ++g) {
    uint8_t const* const weights = decoder.decoded(g);
    decoder.template step<Bands>();
    fence();
    _tile_loadd(6, tokens, 64);
    _tile_loadd(4, weights, 64);
    _tile_dpbsud(0, 6, 4);
    _tile_loadd(7, later, 64);
    _tile_dpbsud(1, 7, 4);
    if constexpr (Bands > 1) {
      _tile_loadd(5, weights + kTileBytes, 64);
      _tile_dpbsud(2, 6, 5);
      _tile_dpbsud(3, 7, 5);
    }
    fence();
    tokens += kTileBytes;
    later += kTileBytes;
  }
  _tile_stored(0, to, kSumStride);
  _tile_stored(1, to_later, kSumStride);
  if constexpr (Bands > 1) {
    _tile_stored(2, to + kBand, kSumStride);
    _tile_stored(3, to_later + kBand, kSumStride);
  }
  fence();
}

using Multiply = void(Place const&, Activations const&, PanelSums&, Ahead&);
template <class Format>
constexpr Multiply* kOneTile[] = {multiply_tile<Format, 1>, multiply_tile<Format, 2>,
                                  multiply_tile<Format, 3>, multiply_tile<Format, 4>};
template <class Format>
constexpr Multiply* kTwoTiles[] = {multiply_tiles<Format, 1>, multiply_tiles<Format, 2>};

template <class Format>
void multiply_by_tiles(
    uint8_t const* weight, int64_t first, int64_t last, Activations const& x, Output const& out) {
  const TileConfig config;
  fence();
  _tile_loadconfig(&config);
  alignas(64) PanelSums sums;
  const int64_t panel_bytes = x.groups * Format::kBlock;
  for (int64_t band = first; band < last;) {
    const int64_t panel = band / kPanelBands;
    const int begin = int(band % kPanelBands);
    const int bands = int(smaller(kPanelBands - begin, last - band));
    uint8_t const* const blocks = weight + panel * panel_bytes;
    Ahead ahead;
    if (out.tokens > kTile && band + bands < last) {
      const int64_t steps = x.groups * bands * ((out.tokens + 2 * kTile - 1) / (2 * kTile));
      ahead = {blocks + panel_bytes, int((panel_bytes / kChunk + steps - 1) / steps)};
    }
    for (int64_t token = 0; token < out.tokens; token += 2 * kTile) {
      const int tokens = int(smaller(2 * kTile, out.tokens - token));
      const int at_once = tokens > kTile ? 2 : kPanelBands;
      for (int b = 0; b < bands; b += at_once) {
        const Place at{blocks, begin + b, int(smaller(at_once, bands - b)), token, tokens};
        start_sums(at, x, sums);
        (tokens > kTile ? kTwoTiles<Format> : kOneTile<Format>)[at.bands - 1](at, x, sums, ahead);
        store_sums(at, kBand * (band + b), sums, out);
      }
    }
    band += bands;
  }
  _tile_release();
}

template <class Format>
constexpr Products products_by_tiles(int64_t fewest_many) {
  return {product_by_codes<Avx512Vnni, Format>(),
          {kTile, kGroup, Avx512Vnni::arrange, multiply_by_tiles<Format>},
          fewest_many};
}

}  // namespace

Kernels const* amx_kernels() {
  static constexpr int64_t kFewestTokens = 5;
  static constexpr Kernels kernels{"amx",
                                   products_by_tiles<Nibbles>(kFewestTokens),
                                   products_by_tiles<Bytes>(kFewestTokens),
                                   products_by_tiles<SixBits>(kFewestTokens),
                                   products_by_tiles<Groups32>(kFewestTokens),
                                   quantize,
                                   rms_norm,
                                   glu,
                                   search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
