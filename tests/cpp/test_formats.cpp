// Every registered weight format: what the packer writes, the kernel's own dequantization reads.
//
// A format's Sample makes logical tensors and says which int8 weight they mean at (n, k).
#include <cstdio>
#include <tuple>
#include <vector>

#include "liquidgemm/formats/a_operand.hpp"
#include "liquidgemm/formats/formats.hpp"

using namespace liquidgemm;

namespace {

int failures = 0;

void expect(bool condition, char const* format, char const* what, int n, int k) {
  if (!condition && ++failures <= 10)
    std::printf("FAILED: %s: %s at (%d, %d)\n", format, what, n, k);
}

constexpr int kN = 70, kKBlocks = 3;  // the last panel is not full

template <class Format>
struct Sample;

// Codes of so many bits on grids of groups of so many columns, all feasible.
template <class Format, int kBits, int kGroup = kBlockK>
struct GridSample {
  static constexpr int kRowBytes = kKBlocks * kBlockK * kBits / 8;
  static constexpr int kRowGroups = kKBlocks * kBlockK / kGroup;
  std::vector<uint8_t> qweight = std::vector<uint8_t>(kN * kRowBytes);
  std::vector<uint8_t> qscale = std::vector<uint8_t>(kN * kRowGroups);
  std::vector<uint8_t> qoffset = std::vector<uint8_t>(kN * kRowGroups);

  explicit GridSample(bool fill) {
    if (!fill)
      return;
    uint32_t state = 1;
    auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 24; };
    for (auto& v : qweight)
      v = next();
    for (size_t i = 0; i < qscale.size(); ++i) {
      qscale[i] = next() % (255 / Format::kMaxCode + 1);
      qoffset[i] = next() % (256 - Format::kMaxCode * qscale[i]);
    }
  }
  LiquidQuant::Logical logical() {
    return {qweight.data(), qscale.data(), qoffset.data(), kN, kKBlocks};
  }
  // Bit by bit: the codes of a row are one number, its lowest byte first.
  int weight(int n, int k) const {
    int code = 0;
    for (int bit = 0; bit < kBits; ++bit)
      code |= (qweight[n * kRowBytes + (kBits * k + bit) / 8] >> (kBits * k + bit) % 8 & 1) << bit;
    const int group = n * kRowGroups + k / kGroup;
    return code * qscale[group] + qoffset[group] - LiquidQuant::kOffsetBias;
  }
  bool operator==(GridSample const&) const = default;
};

template <>
struct Sample<LiquidQuant> : GridSample<LiquidQuant, 4> {
  using GridSample::GridSample;
  LiquidQuant::Logical view() { return logical(); }
};

template <>
struct Sample<LiquidQuant6> : GridSample<LiquidQuant6, 6> {
  using GridSample::GridSample;
  LiquidQuant6::Logical view() { return {logical()}; }
};

template <>
struct Sample<LiquidQuantG32> : GridSample<LiquidQuantG32, 4, 32> {
  using GridSample::GridSample;
  LiquidQuantG32::Logical view() { return {logical()}; }
};

template <>
struct Sample<Int8> {
  std::vector<int8_t> qweight = std::vector<int8_t>(kN * kKBlocks * kBlockK);

  explicit Sample(bool fill) {
    uint32_t state = 1;
    for (size_t i = 0; fill && i < qweight.size(); ++i)
      qweight[i] = static_cast<int8_t>((state = state * 1664525u + 1013904223u) >> 24);
  }
  Int8::Logical view() { return {qweight.data(), kN, kKBlocks}; }
  int weight(int n, int k) const { return qweight[n * kKBlocks * kBlockK + k]; }
  bool operator==(Sample const&) const = default;
};

template <class Format>
void test_format() {
  static_assert(WeightFormat<Format>);
  Sample<Format> sample(true), back(false);
  constexpr int kPanels = (kN + kBlockRows - 1) / kBlockRows;
  std::vector<uint8_t> packed(kPanels * kKBlocks * Format::kBlockBytes, 0xee);
  for (int panel = 0; panel < kPanels; ++panel) {
    for (int kb = 0; kb < kKBlocks; ++kb) {
      uint8_t* const block = &packed[(panel * kKBlocks + kb) * Format::kBlockBytes];
      for (int row = 0; row < kBlockRows; ++row)
        expect(Format::pack_row(sample.view(), panel, kb, Format::row(row), block), Format::kName,
               "feasible", panel, row);
      for (int row = 0; row < kBlockRows; ++row)
        Format::unpack_row(block, panel, kb, Format::row(row), back.view());
      // Of thread t, value v of k step s is A operand (row, k): the layout that wgmma reads.
      for (int thread = 0; thread < kWarpGroupThreads; ++thread) {
        BlockOperand operand;
        Format::dequantize(Format::fragment(block, thread), operand);
        for (int value = 0; value < 32; ++value) {
          const int row_k = AOperandLayout{}(thread, value % 16);
          const int n = panel * kBlockRows + row_k % kBlockRows;
          const int k = kb * kBlockK + value / 16 * kMmaK + row_k / kBlockRows;
          const uint32_t word = operand(value % 16 / 4, 0, value / 16);
          const int actual = static_cast<int8_t>(word >> value % 4 * 8);
          expect(actual == (n < kN ? sample.weight(n, k) : 0), Format::kName, "operand", n, k);
        }
      }
    }
  }
  expect(back == sample, Format::kName, "unpacked", 0, 0);
}

// A packed weight tells its format by the bytes of a block; no other number of bytes does.
template <class Format>
void test_format_is_told() {
  const std::optional<FormatId> id = format_with(Format::kBlockBytes);
  expect(id && block_bytes(*id) == Format::kBlockBytes, Format::kName, "bytes of a block", 0, 0);
  const auto name = [](auto found) { return decltype(found)::type::kName; };
  expect(id && visit_format(*id, name) == Format::kName, Format::kName, "the format told", 0, 0);
  expect(!format_with(Format::kBlockBytes + 1), Format::kName, "no format of one byte more", 0, 0);
}

template <class... Format>
void test_formats(std::tuple<Format...>) {
  (test_format<Format>(), ...);
  (test_format_is_told<Format>(), ...);
}

}  // namespace

int main() {
  test_formats(Formats{});
  std::printf("%s\n", failures ? "formats: FAILED" : "formats: ok");
  return failures != 0;
}
