// Plain C++ for any little-endian processor; compilers make 16-byte vectors of its loops.
#include "liquidgemm/cpu/codes.hpp"
#include "liquidgemm/cpu/sets.hpp"

namespace liquidgemm::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words of the layout are little-endian");

// The bytes of a chunk as 32 halves of two: those at even places and those at odd places.
struct Portable {
  static constexpr int kTokens = 1;  // more would not fit the registers
  static constexpr int kHalves = kChunk / 2, kWords = kChunk / 4;
  // 4 products of a half, and 8 of a word, in 16 bits.
  static_assert(8 * kLargestCode * kLargestX <= kInt16Max);
  static_assert(4 * kLargestCode6 * kLargestX <= kInt16Max);  // the 8 are added in 32

  struct Sums {
    uint32_t words[kWords];
  };
  struct Codes {
    int16_t even[2][kHalves], odd[2][kHalves];  // [low or high nibbles]
  };
  struct Steps {
    int16_t of_row[2];
  };

  static Sums zero() { return {}; }

  static Codes codes(uint8_t const* chunk) {
    Codes result;
    for (int i = 0; i < kHalves; ++i) {
      uint16_t half;
      memcpy(&half, chunk + 2 * i, 2);
      result.even[0][i] = int16_t(half & 15);
      result.even[1][i] = int16_t(half >> 4 & 15);
      result.odd[0][i] = int16_t(half >> 8 & 15);
      result.odd[1][i] = int16_t(half >> 12);
    }
    return result;
  }

  struct Codes6 : Codes {};
  static Codes6 codes6(uint8_t const* chunk, uint8_t const* second) {
    Codes6 result;
    for (int i = 0; i < kHalves; ++i) {
      // Two bytes of the upper half of their four words are made of six.
      const int pair = i % 8, of_second = i / 8 * 8 + 2 * (pair % 4);
      int high[2];
      for (int byte = 0; byte < 2; ++byte) {
        uint8_t const* const w0 = chunk + i / 8 * 16 + 2 * (pair % 4) + byte;
        const int w2 = second[of_second + byte];
        high[byte] = pair < 4 ? w2 & 63 : (w0[0] >> 2 & 48) | (w0[8] >> 4 & 12) | w2 >> 6;
      }
      result.even[0][i] = int16_t(chunk[2 * i] & 63);
      result.odd[0][i] = int16_t(chunk[2 * i + 1] & 63);
      result.even[1][i] = int16_t(high[0]);
      result.odd[1][i] = int16_t(high[1]);
    }
    return result;
  }

  static Steps steps(uint8_t const* params) { return {{params[0], params[2]}}; }

  // Of the low or the high nibbles.
  static void add_products(int16_t (&products)[kHalves],
                           Codes const& codes,
                           int8_t const* x,
                           int nibble) {
    for (int i = 0; i < kHalves; ++i) {
      uint16_t half;
      memcpy(&half, x + kChunk * nibble + 2 * i, 2);
      const int16_t even = int16_t(int16_t(half << 8) >> 8), odd = int16_t(int16_t(half) >> 8);
      products[i] = int16_t(products[i] + codes.even[nibble][i] * even);
      products[i] = int16_t(products[i] + codes.odd[nibble][i] * odd);
    }
  }
  static void add(Sums& sums, int16_t const (&products)[kHalves], Steps steps) {
    for (int i = 0; i < kWords; ++i)
      sums.words[i] += uint32_t((products[2 * i] + products[2 * i + 1]) * steps.of_row[i % 2]);
  }

  static Sums multiply_add(Sums sums, Codes const& codes, int8_t const* x, Steps steps) {
    int16_t products[kHalves] = {};
    for (int nibble = 0; nibble < 2; ++nibble)
      add_products(products, codes, x, nibble);
    add(sums, products, steps);
    return sums;
  }

  static Sums multiply_add(
      Sums sums, Codes const& codes, int8_t const* x, Steps steps, Steps high_steps) {
    for (int nibble = 0; nibble < 2; ++nibble) {
      int16_t products[kHalves] = {};
      add_products(products, codes, x, nibble);
      add(sums, products, nibble ? high_steps : steps);
    }
    return sums;
  }

  struct Int8s {
    int16_t even[kHalves], odd[kHalves];
  };
  static constexpr bool kInt8sAreBiased = false;

  static Int8s int8s(uint8_t const* chunk) {
    Int8s result;
    for (int i = 0; i < kHalves; ++i) {
      result.even[i] = int8_t(chunk[2 * i]);
      result.odd[i] = int8_t(chunk[2 * i + 1]);
    }
    return result;
  }

  static Sums multiply_add(Sums sums, Int8s const& weights, int8_t const* x) {
    for (int i = 0; i < kHalves; ++i) {
      sums.words[i / 2] +=
          uint32_t(weights.even[i] * x[2 * i]) + uint32_t(weights.odd[i] * x[2 * i + 1]);
    }
    return sums;
  }

  static void add_offsets(uint8_t const* params, int32_t sum, int32_t* rows) {
    for (int g = 0; g < kBandChunks; ++g) {
      rows[g] = int32_t(uint32_t(rows[g]) + uint32_t(params[4 * g + 1] * sum));
      rows[g + 8] = int32_t(uint32_t(rows[g + 8]) + uint32_t(params[4 * g + 3] * sum));
    }
  }

  static void fold(Sums const* sums, int stride, int32_t* rows) {
    for (int g = 0; g < kBandChunks; ++g) {
      uint32_t of_row[2] = {uint32_t(rows[g]), uint32_t(rows[g + 8])};
      for (int i = 0; i < kWords; ++i)
        of_row[i % 2] += sums[g * stride].words[i];
      rows[g] = int32_t(of_row[0]);
      rows[g + 8] = int32_t(of_row[1]);
    }
  }
};

}  // namespace

Kernels const* portable_kernels() {
  static constexpr Kernels kernels{"portable",
                                   always(product_by_codes<Portable>()),
                                   always(product_by_codes<Portable, Bytes>()),
                                   always(product_by_codes<Portable, SixBits>()),
                                   always(product_by_codes<Portable, Groups32>()),
                                   quantize,
                                   rms_norm,
                                   glu,
                                   search};
  return &kernels;
}

}  // namespace liquidgemm::cpu
