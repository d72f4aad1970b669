// NEON with i8mm: one instruction (smmla) multiplies 8 k of two rows by those of two tokens, twice
// the work of a dot product. A single token has no partner and goes by dot products.
#include "liquidgemm/cpu/neon.hpp"
#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {
namespace {

inline constexpr int kPairArranged = 2 * kGroup;  // bytes of a group of two tokens

// 8 bytes of each token at a time, in the order of a chunk's registers: those of the low nibbles,
// then those of the high ones. Layout: [tokens / 2][groups][8][2 tokens][8 k].
void arrange_pair(int8_t const* rows, int64_t first, Activations const& to) {
  int8_t* x = to.x + first * to.groups * kGroup;
  uint32_t totals[2] = {};
  for (int64_t g = 0; g < to.groups; ++g) {
    for (int t = 0; t < 2; ++t) {
      int8_t const* const from = rows + (t * to.groups + g) * kGroup;
      for (int i = 0; i < 8; ++i) {
        const int k = first_k(i % 4 * 4) + 32 * (i / 4);
        memcpy(x + 16 * i + 8 * t, from + k, 4);
        memcpy(x + 16 * i + 8 * t + 4, from + k + 16, 4);
      }
      int32_t sum = 0;
      for (int i = 0; i < kGroup; ++i)
        sum += from[i];
      to.group_sums[(first + t) * to.groups + g] = sum;
      totals[t] += uint32_t(sum);
    }
    x += kPairArranged;
  }
  for (int t = 0; t < 2; ++t)
    to.totals[first + t] = int32_t(totals[t]);
}

// `Pairs` pairs of tokens from `token` on times bands [first, last) of one panel. Lanes of sums:
// row g and tokens 0 and 1, then row g + 8.
template <int Pairs>
void multiply_pairs(uint8_t const* panel,
                    int64_t n,
                    int first,
                    int last,
                    Activations const& x,
                    int64_t token,
                    Output const& out) {
  const uint8_t kRowByRow[16] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};
  const uint8x16_t order = vld1q_u8(kRowByRow);
  int8_t const* const tokens = x.x + token * x.groups * kGroup;
  const int64_t pair_stride = x.groups * kPairArranged;
  int32x4_t sums[kPanelChunks][Pairs];
  for (int chunk = kBandChunks * first; chunk < kBandChunks * last; ++chunk) {
    for (int p = 0; p < Pairs; ++p)
      sums[chunk][p] = vdupq_n_s32(0);
  }
  int32_t rows[2 * Pairs][kPanel];
  for (int t = 0; t < 2 * Pairs; ++t) {
    for (int row = kBand * first; row < kBand * last; ++row)
      rows[t][row] = minus_128_times(x.totals[token + t]);
  }
  for (int64_t begin = 0; begin < x.groups; begin += kRun) {
    const int64_t end = smaller(begin + kRun, x.groups);
    for (int chunk = kBandChunks * first; chunk < kBandChunks * last; ++chunk) {
      int32x4_t run[Pairs];
      for (int p = 0; p < Pairs; ++p)
        run[p] = sums[chunk][p];
      for (int64_t g = begin; g < end; ++g) {
        uint8_t const* const block = panel + g * Nibbles::kBlock;
        __builtin_prefetch(block + kRun * Nibbles::kBlock + kChunk * chunk);
        int32x4_t products[Pairs];
        for (int p = 0; p < Pairs; ++p)
          products[p] = vdupq_n_s32(0);
        for (int i = 0; i < 4; ++i) {
          const uint8x16_t bytes = vqtbl1q_u8(vld1q_u8(block + kChunk * chunk + 16 * i), order);
          const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
          const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
          for (int p = 0; p < Pairs; ++p) {
            int8_t const* const x_pair = tokens + p * pair_stride + g * kPairArranged + 16 * i;
            products[p] = vmmlaq_s32(products[p], low, vld1q_s8(x_pair));
            products[p] = vmmlaq_s32(products[p], high, vld1q_s8(x_pair + kGroup));
          }
        }
        uint8_t const* const params = block + Nibbles::kParams + 4 * chunk;
        const int32x4_t steps = vcombine_s32(vdup_n_s32(params[0]), vdup_n_s32(params[2]));
        for (int p = 0; p < Pairs; ++p)
          run[p] = vmlaq_s32(run[p], products[p], steps);
      }
      for (int p = 0; p < Pairs; ++p)
        sums[chunk][p] = run[p];
    }
    for (int64_t g = begin; g < end; ++g) {
      for (int band = first; band < last; ++band) {
        uint8_t const* const params =
            panel + g * Nibbles::kBlock + Nibbles::kParams + 4 * kBandChunks * band;
        for (int t = 0; t < 2 * Pairs; ++t)
          NeonDotprod::add_offsets(params, x.group_sums[(token + t) * x.groups + g],
                                   rows[t] + kBand * band);
      }
    }
  }
  for (int chunk = kBandChunks * first; chunk < kBandChunks * last; ++chunk) {
    const int row = kBand * (chunk / kBandChunks) + chunk % kBandChunks;
    for (int p = 0; p < Pairs; ++p) {
      int32_t lanes[4];
      vst1q_s32(lanes, sums[chunk][p]);
      for (int i = 0; i < 4; ++i) {
        int32_t& to = rows[2 * p + i % 2][row + 8 * (i / 2)];
        to = int32_t(uint32_t(to) + uint32_t(lanes[i]));
      }
    }
  }
  const int64_t stored = smaller(2 * Pairs, out.tokens - token);
  for (int64_t t = 0; t < stored; ++t)
    store_row(out, token + t, n + kBand * first, kBand * (last - first), rows[t] + kBand * first);
}

void multiply_by_pairs(
    uint8_t const* weight, int64_t first, int64_t last, Activations const& x, Output const& out) {
  for (int64_t band = first; band < last;) {
    const int64_t panel = band / kPanelBands;
    const int begin = int(band % kPanelBands);
    const int end = int(smaller(kPanelBands, last - panel * kPanelBands));
    uint8_t const* const blocks = weight + panel * x.groups * Nibbles::kBlock;
    int64_t token = 0;
    for (; token + 8 <= x.tokens; token += 8)
      multiply_pairs<4>(blocks, panel * kPanel, begin, end, x, token, out);
    for (; token < x.tokens; token += 2)
      multiply_pairs<1>(blocks, panel * kPanel, begin, end, x, token, out);
    band += end - begin;
  }
}

}  // namespace

Kernels const* neon_i8mm_kernels() {
  static constexpr int64_t kFewestTokens = 2;
  static constexpr Kernels kernels{"neon_i8mm",
                                   {product_by_codes<NeonDotprod>(),
                                    {2, kGroup, arrange_pair, multiply_by_pairs},
                                    kFewestTokens},
                                   always(product_by_codes<NeonDotprod, Bytes>()),
                                   always(product_by_codes<NeonDotprod, SixBits>()),
                                   always(product_by_codes<NeonDotprod, Groups32>()),
                                   quantize,
                                   rms_norm,
                                   glu,
                                   search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
