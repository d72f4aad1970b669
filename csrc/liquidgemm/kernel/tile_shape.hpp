// What a tile is: a value that names a kernel, for the kernel template and for the choice of plans.
//
// A CTA computes `panels` x 64 output channels for `tokens` tokens with panels * k_groups consumer
// warp-groups. The k_groups of a panel share its rows and take the pipeline stages alternately, so
// that even a single panel keeps two to four of them dequantizing. The epilogue adds their int32
// partial sums. Some CTAs occupy half an SM: in the other half a CTA of the next launch already
// fetches its first weights.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace liquidgemm {

// Tiles for so many tokens have a variant that quantizes its activations:
// load/tokens_quantized.hpp.
inline constexpr int kMostQuantizedTokens = 8;

struct TileShape {
  int tokens;        // N of the wgmma
  int panels;        // 64-channel panels per CTA
  int k_groups;      // consumer warp-groups per panel, alternating along K
  int stage_blocks;  // 64-deep blocks per pipeline stage
  int ctas_per_sm = 1;
  int stages_ahead = 0;  // of each k group, at most: dequantized before the tokens arrive

  // Whether a group has all of K, and CTAs can work in pairs: see schedule/dense.hpp. The other
  // tiles are for few tokens, and their clusters share K.
  constexpr bool can_pair() const { return k_groups == 1; }
  constexpr bool can_quantize() const { return tokens == kMostQuantizedTokens; }
  // Rows of a box of y. A pair shares them, so there are two at least.
  constexpr int store_tokens() const { return tokens < 64 || tokens == 96 ? 16 : 32; }

  friend constexpr bool operator==(TileShape const&, TileShape const&) = default;
};

// Tiles of the same name differ at most in how many stages they can hold ahead.
constexpr bool has_same_name(TileShape const& a, TileShape const& b) {
  return a.tokens == b.tokens && a.panels == b.panels && a.k_groups == b.k_groups &&
         a.stage_blocks == b.stage_blocks && a.ctas_per_sm == b.ctas_per_sm;
}

// Such as t8_p1_k2_s4_half.
inline std::string name(TileShape const& shape) {
  char text[64];
  std::snprintf(text, sizeof text, "t%d_p%d_k%d_s%d%s", shape.tokens, shape.panels, shape.k_groups,
                shape.stage_blocks, shape.ctas_per_sm == 2 ? "_half" : "");
  return text;
}

// How many CTAs may share every tile along K, if k groups alternate.
inline constexpr int kSplits[] = {1, 2, 4};

// How many tokens a CTA can quantize: they pass through registers, and stay in shared memory. The
// limit leaves the ring as many stages as it has if its stages hold tokens as well.
inline constexpr int kMostQuantizedElements = 32 << 10;
constexpr int most_quantized_bytes(int ctas_per_sm) {
  return (ctas_per_sm == 1 ? 37 : 33) * 1024;
}

// Between chunks of 16 k of m such tokens: see load/tokens_quantized.hpp.
constexpr int64_t quantized_chunk_stride(int64_t m) {
  return 16 * (m | 1);
}

}  // namespace liquidgemm
