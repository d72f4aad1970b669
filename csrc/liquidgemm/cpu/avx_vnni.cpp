// AVX-VNNI: four products of bytes per 32-bit lane (vpdpbusd), in registers of 32 bytes.
#include "liquidgemm/cpu/decode256.hpp"
#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {
namespace {

// sums + products of unsigned and signed bytes. The intrinsic would do, but GCC 12 copies its sums
// from one register to another.
inline void add_products(__m256i& sums, __m256i weights, __m256i x) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(weights), "x"(x));
}

struct AvxVnni : X86With32Bytes, BandByBand<AvxVnni> {
  using BandByBand<AvxVnni>::multiply;

  static constexpr int kDecodedBand = kTileBytes;
  static constexpr auto arrange = arrange_tile<AvxVnni>;
  static constexpr int kToken = kGroup;

  // A lane has four products of each of the chunk's four registers of codes. Its upper 16 bits,
  // which are its sign, are multiplied by 0.
  static_assert(16 * kLargestCode * kLargestX <= kInt16Max);

  static Sums multiply_add(Sums sums, Codes const& codes, int8_t const* x, Steps steps) {
    __m256i products = _mm256_dpbusd_avx_epi32(zero(), codes.low[0], load256(x));
    products = _mm256_dpbusd_avx_epi32(products, codes.low[1], load256(x + 32));
    products = _mm256_dpbusd_avx_epi32(products, codes.high[0], load256(x + 64));
    products = _mm256_dpbusd_avx_epi32(products, codes.high[1], load256(x + 96));
    return _mm256_dpwssd_avx_epi32(sums, products, steps);
  }

  static_assert(8 * kLargestCode * kLargestX <= kInt16Max);
  static Sums multiply_add(
      Sums sums, Codes const& codes, int8_t const* x, Steps steps, Steps high_steps) {
    __m256i low = _mm256_dpbusd_avx_epi32(zero(), codes.low[0], load256(x));
    low = _mm256_dpbusd_avx_epi32(low, codes.low[1], load256(x + 32));
    __m256i high = _mm256_dpbusd_avx_epi32(zero(), codes.high[0], load256(x + 64));
    high = _mm256_dpbusd_avx_epi32(high, codes.high[1], load256(x + 96));
    return _mm256_dpwssd_avx_epi32(_mm256_dpwssd_avx_epi32(sums, low, steps), high, high_steps);
  }

  static_assert(4 * kLargestCode6 * kLargestX <= kInt16Max);
  static Sums multiply_add(Sums sums, Codes6 const& codes, int8_t const* x, Steps steps) {
    for (int i = 0; i < 2; ++i) {
      const __m256i low = _mm256_dpbusd_avx_epi32(zero(), codes.low[i], load256(x + 32 * i));
      const __m256i high = _mm256_dpbusd_avx_epi32(zero(), codes.high[i], load256(x + 64 + 32 * i));
      sums = _mm256_dpwssd_avx_epi32(_mm256_dpwssd_avx_epi32(sums, low, steps), high, steps);
    }
    return sums;
  }

  struct Int8s {
    __m256i of[2];
  };
  static constexpr bool kInt8sAreBiased = true;
  static Int8s int8s(uint8_t const* chunk) {
    const __m256i bias = _mm256_set1_epi8(-128);
    return {{_mm256_xor_si256(load256(chunk), bias), _mm256_xor_si256(load256(chunk + 32), bias)}};
  }
  static Sums multiply_add(Sums sums, Int8s const& weights, int8_t const* x) {
    sums = _mm256_dpbusd_avx_epi32(sums, weights.of[0], load256(x));
    return _mm256_dpbusd_avx_epi32(sums, weights.of[1], load256(x + 32));
  }

  static void arrange_band(uint8_t const* chunks, uint8_t* to) { arrange_band256(chunks, to); }

  // Of half a band each. A code times s fits a byte, so that a 16-bit product of two codes does not
  // carry.
  struct Grid {
    __m256i s[2], a[2];

    explicit Grid(uint8_t const* params) {
      const __m256i step_order = _mm256_broadcastsi128_si256(
          _mm_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1));
      const __m256i offset_order = _mm256_broadcastsi128_si256(
          _mm_setr_epi8(1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13));
      for (int half = 0; half < 2; ++half) {
        const __m256i words = words_of_lanes(params + 16 * half);
        s[half] = _mm256_shuffle_epi8(words, step_order);
        a[half] = _mm256_shuffle_epi8(words, offset_order);
      }
    }
    __m256i decode(__m256i codes, int half) const {
      return _mm256_add_epi8(_mm256_mullo_epi16(codes, s[half]), a[half]);
    }
  };

  static void decode_band(uint8_t const* chunks, uint8_t const* params, uint8_t* to) {
    const Grid grid(params);
    decode_lanes(chunks, to,
                 [&](__m256i codes, int half, int) { return grid.decode(codes, half); });
  }

  static void decode_band32(uint8_t const* chunks,
                            uint8_t const* params,
                            uint8_t const* high_params,
                            uint8_t* to) {
    const Grid grids[2] = {Grid(params), Grid(high_params)};
    decode_lanes(chunks, to, [&](__m256i codes, int half, int nibble) {
      return grids[nibble].decode(codes, half);
    });
  }

  static void decode_band6(uint8_t const* chunks,
                           uint8_t const* second,
                           uint8_t const* params,
                           uint8_t* to) {
    const Grid grid(params);
    alignas(32) uint8_t codes[2][kBandChunks * kChunk];
    for (int i = 0; i < 2 * kBandChunks; ++i) {
      const Codes6Of32Bytes half(chunks + 32 * i, second + 16 * i);
      store256(codes[0] + 32 * i, half.low);
      store256(codes[1] + 32 * i, half.high);
    }
    for (int high = 0; high < 2; ++high) {
      transpose_words(codes[high], [&](__m256i words, int half, int at) {
        store256(to + high * kTileBytes / 2 + at, grid.decode(words, half));
      });
    }
  }

  static int32_t sum(int8_t const* row, int64_t count) {
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i sum = zero();
    for (int64_t i = 0; i < count; i += 32)
      sum = _mm256_dpbusd_avx_epi32(sum, ones, load256(row + i));
    return sum_of(sum);
  }

  // T tokens times a band: 2 T sums, two weights and one word of x are registers.
  template <int T>
  [[gnu::noinline]] static void multiply(
      uint8_t const* weights, int8_t const* x, int depth, int32_t* sums, Lines& ahead) {
    __m256i part[T][2];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int half = 0; half < 2; ++half)
        part[t][half] = load256(sums + kPanel * t + 8 * half);
    }
    for (int d = 0; d < depth; ++d) {
      ahead.step();
#pragma GCC unroll 1
      for (int k = 0; k < kGroup; k += 4) {
        const __m256i w[2] = {load256(weights + kBand * k), load256(weights + kBand * k + 32)};
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const __m256i word = _mm256_set1_epi32(load_word(x + kGroup * t + k));
#pragma GCC unroll 8
          for (int half = 0; half < 2; ++half)
            add_products(part[t][half], w[half], word);
        }
      }
      weights += kPanelBands * kDecodedBand;
      x += kTileBytes;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int half = 0; half < 2; ++half)
        store256(sums + kPanel * t + 8 * half, part[t][half]);
    }
  }
};

}  // namespace

Kernels const* avx_vnni_kernels() {
  static constexpr int64_t kFewestTokens = 5;
  static constexpr Kernels kernels{"avx_vnni",
                                   products<AvxVnni, Nibbles>(kFewestTokens),
                                   products<AvxVnni, Bytes>(kFewestTokens),
                                   products<AvxVnni, SixBits>(kFewestTokens),
                                   products<AvxVnni, Groups32>(kFewestTokens),
                                   quantize,
                                   rms_norm,
                                   glu,
                                   search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
