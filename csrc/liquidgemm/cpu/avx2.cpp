// AVX2: products of bytes in pairs of 16 bits (vpmaddubsw), which saturate at 32 767.
#include "liquidgemm/cpu/decode256.hpp"
#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {
namespace {

// sums + products of unsigned and signed bytes, two to a 16-bit sum. By intrinsics GCC 12 makes all
// products first, and spills them.
inline void add_products(__m256i& sums, __m256i codes, __m256i x) {
  __m256i products;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
          : "+x"(sums), "=&x"(products)
          : "x"(codes), "x"(x));
}

struct Avx2 : X86With32Bytes, BandByBand<Avx2> {
  using BandByBand<Avx2>::multiply;

  // A half has two products of each of the chunk's four registers of codes.
  static_assert(8 * kLargestCode * kLargestX <= kInt16Max);

  // (s[g], s[g], s[g + 8], s[g + 8], ...): a word has two halves to be multiplied.
  static Steps steps(uint8_t const* params) {
    const __m128i order = _mm_setr_epi8(0, -1, 0, -1, 2, -1, 2, -1, 0, -1, 0, -1, 2, -1, 2, -1);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(load_word(params)),
                               _mm256_broadcastsi128_si256(order));
  }

  static Sums multiply_add(Sums sums, Codes const& codes, int8_t const* x, Steps steps) {
    const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(codes.low[0], load256(x)),
                                         _mm256_maddubs_epi16(codes.low[1], load256(x + 32)));
    const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(codes.high[0], load256(x + 64)),
                                          _mm256_maddubs_epi16(codes.high[1], load256(x + 96)));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_add_epi16(low, high), steps));
  }

  // Of codes of 4 or 6 bits.
  static_assert(4 * kLargestCode6 * kLargestX <= kInt16Max);
  template <class AnyCodes>
  static Sums multiply_add(
      Sums sums, AnyCodes const& codes, int8_t const* x, Steps steps, Steps high_steps) {
    const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(codes.low[0], load256(x)),
                                         _mm256_maddubs_epi16(codes.low[1], load256(x + 32)));
    const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(codes.high[0], load256(x + 64)),
                                          _mm256_maddubs_epi16(codes.high[1], load256(x + 96)));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(low, steps));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(high, high_steps));
  }

  static Sums multiply_add(Sums sums, Codes6 const& codes, int8_t const* x, Steps steps) {
    return multiply_add(sums, codes, x, steps, steps);
  }

  // INT8 weights do not fit vpmaddubsw's 16-bit sums: 16-bit halves of the bytes at even and at odd
  // places.
  struct Int8s {
    __m256i even[2], odd[2];
  };
  static constexpr bool kInt8sAreBiased = false;
  static __m256i even_bytes(__m256i bytes) {
    return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
  }
  static Int8s int8s(uint8_t const* chunk) {
    const __m256i bytes[2] = {load256(chunk), load256(chunk + 32)};
    return {{even_bytes(bytes[0]), even_bytes(bytes[1])},
            {_mm256_srai_epi16(bytes[0], 8), _mm256_srai_epi16(bytes[1], 8)}};
  }
  static Sums multiply_add(Sums sums, Int8s const& weights, int8_t const* x) {
    for (int i = 0; i < 2; ++i) {
      const __m256i bytes = load256(x + 32 * i);
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(weights.even[i], even_bytes(bytes)));
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(weights.odd[i], _mm256_srai_epi16(bytes, 8)));
    }
    return sums;
  }

  // Codes as lanes of one row each, then (s, s) of each of the 16 lanes, then (a, 0).
  static constexpr int kSteps = kTileBytes, kOffsets = kSteps + 4 * kBand;
  static constexpr int kDecodedBand = kOffsets + 4 * kBand;

  static void codes_of_lanes(uint8_t const* chunks, uint8_t* to) {
    decode_lanes(chunks, to, [](__m256i codes, int /*half*/, int /*nibble*/) { return codes; });
  }
  static __m256i steps_of_lanes(__m256i words) {
    const __m128i order = _mm_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1);
    return _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
  }

  static void decode_band(uint8_t const* chunks, uint8_t const* params, uint8_t* to) {
    codes_of_lanes(chunks, to);
    for (int half = 0; half < 2; ++half) {
      const __m256i words = words_of_lanes(params + 16 * half);
      store256(to + kSteps + 32 * half, steps_of_lanes(words));
      store256(to + kOffsets + 32 * half, _mm256_srli_epi32(words, 8));
    }
  }

  // Behind the 64 k of an even group are the sums of its x and of the next group's, as 16 bits.
  static constexpr int kToken = kGroup + 4;

  static void arrange(int8_t const* rows, int64_t first, Activations const& to) {
    arrange_tile<Avx2>(rows, first, to);
    for (int t = 0; t < kTile; ++t) {
      int8_t const* const row = rows + t * to.groups * kGroup;
      for (int64_t g = 0; g < to.groups; g += 2) {
        const bool both = g + 1 < to.groups;
        const auto one = uint32_t(sum(row + g * kGroup, kGroup));
        const auto two = both ? uint32_t(sum(row + (g + 1) * kGroup, kGroup)) : 0;
        const uint32_t sums = two << 16 | (one & 0xffff);
        memcpy(tile_x<Avx2>(to, first, g) + t * kToken + kGroup, &sums, sizeof sums);
      }
    }
  }

  static int32_t sum(int8_t const* row, int64_t count) {
    const __m256i bytes = _mm256_set1_epi8(1), halves = _mm256_set1_epi16(1);
    __m256i sum = zero();
    for (int64_t i = 0; i < count; i += 32)
      sum = _mm256_add_epi32(
          sum, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, load256(row + i)), halves));
    return sum_of(sum);
  }

  // sums += s * (codes * x) of half a group; s[half] has (s, s) for half of the lanes.
  template <int T>
  static void add_half(uint8_t const* codes,
                       int8_t const* x,
                       int32_t* sums,
                       __m256i const (&s)[2]) {
    // A half of a lane has two products of each of eight words.
    static_assert(16 * kLargestCode * kLargestX <= kInt16Max);
    __m256i part[T][2];
    const __m256i first[2] = {load256(codes), load256(codes + 32)};
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256i word = _mm256_set1_epi32(load_word(x + kToken * t));
      part[t][0] = _mm256_maddubs_epi16(first[0], word);
      part[t][1] = _mm256_maddubs_epi16(first[1], word);
    }
#pragma GCC unroll 8
    for (int k = 4; k < kGroup / 2; k += 4) {
      const __m256i next[2] = {load256(codes + kBand * k), load256(codes + kBand * k + 32)};
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m256i word = _mm256_set1_epi32(load_word(x + kToken * t + k));
        add_products(part[t][0], next[0], word);
        add_products(part[t][1], next[1], word);
      }
    }
#pragma GCC unroll 8
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        int32_t* const to = sums + kPanel * t + 8 * half;
        store256(to, add_at(to, _mm256_madd_epi16(part[t][half], s[half])));
      }
    }
    __asm__("" ::: "memory");  // or sums of two halves are held in registers, and spilled
  }

  // a * (sum of x) of two groups; a[half] has both for half of the lanes.
  struct OffsetPairs {
    __m256i a[2];
  };
  template <int T>
  static void add_offset_pairs(OffsetPairs const& pairs, int8_t const* x, int32_t* sums) {
#pragma GCC unroll 8
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m256i x_sums = _mm256_set1_epi32(load_word(x + kToken * t + kGroup));
        int32_t* const to = sums + kPanel * t + 8 * half;
        store256(to, add_at(to, _mm256_madd_epi16(pairs.a[half], x_sums)));
      }
    }
  }

  // Of a group and, if there is one, the next.
  template <int T>
  static void add_offsets_of_two(uint8_t const* band, bool both, int8_t const* x, int32_t* sums) {
    OffsetPairs pairs;
    for (int half = 0; half < 2; ++half) {
      pairs.a[half] = load256(band + kOffsets + 32 * half);
      if (both) {
        const __m256i next = load256(band + kPanelBands * kDecodedBand + kOffsets + 32 * half);
        pairs.a[half] = _mm256_or_si256(pairs.a[half], _mm256_slli_epi32(next, 16));
      }
    }
    add_offset_pairs<T>(pairs, x, sums);
  }

  // T tokens times a band: 2 T sums of half a group, two codes and one word of x are registers.
  template <int T>
  [[gnu::noinline]] static void multiply(
      uint8_t const* weights, int8_t const* x, int depth, int32_t* sums, Lines& ahead) {
    for (int d = 0; d < depth; ++d) {
      ahead.step();
      const __m256i s[2] = {load256(weights + kSteps), load256(weights + kSteps + 32)};
      add_half<T>(weights, x, sums, s);
      add_half<T>(weights + kTileBytes / 2, x + kGroup / 2, sums, s);
      if (d % 2 == 0)
        add_offsets_of_two<T>(weights, d + 1 < depth, x, sums);
      weights += kPanelBands * kDecodedBand;
      x += kTile * kToken;
    }
  }
};

// Groups of 32: each half of a group has steps of its own, and one multiply-add takes the offsets
// of both.
struct Avx2Groups32 : X86With32Bytes, BandByBand<Avx2Groups32> {
  using BandByBand<Avx2Groups32>::multiply;

  // Codes as lanes, then (s, s) of each of the 16 lanes, of the low nibbles and of the high ones,
  // then (a, a of the high ones).
  static constexpr int kSteps = kTileBytes, kHighSteps = kSteps + 4 * kBand;
  static constexpr int kOffsets = kHighSteps + 4 * kBand;
  static constexpr int kDecodedBand = kOffsets + 4 * kBand;

  static void decode_band32(uint8_t const* chunks,
                            uint8_t const* params,
                            uint8_t const* high_params,
                            uint8_t* to) {
    Avx2::codes_of_lanes(chunks, to);
    for (int half = 0; half < 2; ++half) {
      const __m256i low = words_of_lanes(params + 16 * half);
      const __m256i high = words_of_lanes(high_params + 16 * half);
      store256(to + kSteps + 32 * half, Avx2::steps_of_lanes(low));
      store256(to + kHighSteps + 32 * half, Avx2::steps_of_lanes(high));
      const __m256i of_high = _mm256_slli_epi32(_mm256_srli_epi32(high, 8), 16);
      store256(to + kOffsets + 32 * half, _mm256_or_si256(_mm256_srli_epi32(low, 8), of_high));
    }
  }

  // Behind the 64 k of each group are the sums of the x of its halves, as 16 bits.
  static constexpr int kToken = Avx2::kToken;

  static void arrange(int8_t const* rows, int64_t first, Activations const& to) {
    arrange_tile<Avx2>(rows, first, to);
    for (int t = 0; t < kTile; ++t) {
      int8_t const* const row = rows + t * to.groups * kGroup;
      for (int64_t g = 0; g < to.groups; ++g) {
        int8_t const* const x = row + g * kGroup;
        const auto low = uint32_t(Avx2::sum(x, kGroup / 2));
        const auto high = uint32_t(Avx2::sum(x + kGroup / 2, kGroup / 2));
        const uint32_t sums = high << 16 | (low & 0xffff);
        memcpy(tile_x<Avx2>(to, first, g) + t * kToken + kGroup, &sums, sizeof sums);
      }
    }
  }

  template <int T>
  [[gnu::noinline]] static void multiply(
      uint8_t const* weights, int8_t const* x, int depth, int32_t* sums, Lines& ahead) {
    for (int d = 0; d < depth; ++d) {
      ahead.step();
      for (int high = 0; high < 2; ++high) {
        uint8_t const* const steps = weights + (high ? kHighSteps : kSteps);
        const __m256i s[2] = {load256(steps), load256(steps + 32)};
        Avx2::add_half<T>(weights + high * kTileBytes / 2, x + high * kGroup / 2, sums, s);
      }
      Avx2::add_offset_pairs<T>({load256(weights + kOffsets), load256(weights + kOffsets + 32)}, x,
                                sums);
      weights += kPanelBands * kDecodedBand;
      x += kTile * kToken;
    }
  }
};

// INT8 weights plus 128 as two codes each, 16 times the upper one and the lower one: a product of
// whole bytes does not fit 16 bits.
struct Avx2Int8 : X86With32Bytes, BandByBand<Avx2Int8> {
  using BandByBand<Avx2Int8>::multiply;

  static constexpr int kDecodedBand = 2 * kTileBytes;  // lower codes, then upper ones
  static constexpr int kToken = Avx2::kToken;
  static constexpr auto arrange = Avx2::arrange;  // sums of groups are not used

  static void arrange_band(uint8_t const* chunks, uint8_t* to) {
    const __m256i nibble = _mm256_set1_epi8(15), bias = _mm256_set1_epi8(8);
    for (int high = 0; high < 2; ++high) {  // k
      transpose_words(chunks + kHigh * high, [&](__m256i weights, int /*half*/, int at) {
        uint8_t* const code = to + high * kTileBytes / 2 + at;
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(weights, 4), nibble);
        store256(code, _mm256_and_si256(weights, nibble));
        store256(code + kTileBytes, _mm256_xor_si256(upper, bias));
      });
    }
  }

  template <int T>
  [[gnu::noinline]] static void multiply(
      uint8_t const* weights, int8_t const* x, int depth, int32_t* sums, Lines& ahead) {
    const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    const __m256i of_lower[2] = {one, one}, of_upper[2] = {sixteen, sixteen};
    for (int d = 0; d < depth; ++d) {
      ahead.step();
      for (int half = 0; half < 2; ++half) {
        uint8_t const* const codes = weights + half * kTileBytes / 2;
        int8_t const* const of_half = x + half * kGroup / 2;
        Avx2::add_half<T>(codes, of_half, sums, of_lower);
        Avx2::add_half<T>(codes + kTileBytes, of_half, sums, of_upper);
      }
      weights += kPanelBands * kDecodedBand;
      x += kTile * kToken;
    }
  }
};

}  // namespace

Kernels const* avx2_kernels() {
  static constexpr int64_t kFewestTokens = 5;
  static constexpr Kernels kernels{
      "avx2",
      products<Avx2, Nibbles>(kFewestTokens),
      {product_by_codes<Avx2, Bytes>(), product_by_bytes<Avx2Int8, Bytes>(), kFewestTokens},
      always(product_by_codes<Avx2, SixBits>()),
      {product_by_codes<Avx2, Groups32>(), product_by_bytes<Avx2Groups32, Groups32>(),
       kFewestTokens},
      quantize,
      rms_norm,
      glu,
      search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
