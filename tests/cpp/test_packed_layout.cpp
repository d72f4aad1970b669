// The packed layout against CuTe's own description of the wgmma A operand.
#include <cstdio>
#include <set>
#include <vector>

#include "liquidgemm/quant/pack.hpp"

using namespace liquidgemm;

namespace {

int failures = 0;

void expect(bool condition, char const* what, int a, int b) {
  if (condition)
    return;
  if (++failures <= 10)
    std::printf("FAILED: %s at (%d, %d)\n", what, a, b);
}

// Every code of a block has a nibble of its own, and the codes fill the block.
void test_bijection() {
  std::set<std::pair<int, int>> seen;
  for (int row = 0; row < kBlockRows; ++row) {
    for (int k = 0; k < kBlockK; ++k) {
      const CodePosition p = code_position(row, k);
      expect(p.byte >= 0 && p.byte < kBlockCodeBytes && (p.shift == 0 || p.shift == 4),
             "position inside the block", row, k);
      expect(seen.insert({p.byte, p.shift}).second, "position used once", row, k);
    }
  }
  expect(static_cast<int>(seen.size()) == kBlockRows * kBlockK, "block filled", 0, 0);
}

// What thread t finds in nibbles `step` of its 16 bytes, in order, is its A fragment of that MMA.
void test_fragment_map() {
  constexpr AOperandLayout layout;
  for (int step = 0; step < kBlockK / kMmaK; ++step) {
    for (int thread = 0; thread < kWarpGroupThreads; ++thread) {
      for (int value = 0; value < kCodeBytesPerThread; ++value) {
        const int row_k = layout(thread, value);
        const int row = row_k % kBlockRows;
        const int k = row_k / kBlockRows + step * kMmaK;
        const CodePosition p = code_position(row, k);
        expect(p.byte == kCodeBytesPerThread * thread + value && p.shift == 4 * step,
               "nibble is the fragment element", thread, value);
        // The thread's parameter word holds this row's (s, a) in the half of its register.
        const int register_half = value / 4 % 2;
        expect(param_position(row) == kBlockCodeBytes + 4 * param_word(thread) + 2 * register_half,
               "parameters of the row", thread, value);
      }
    }
  }
}

void test_param_positions_disjoint() {
  std::set<int> seen;
  for (int row = 0; row < kBlockRows; ++row) {
    const int p = param_position(row);
    expect(p >= kBlockCodeBytes && p + 1 < kBlockBytes, "parameters inside the block", row, p);
    expect(seen.insert(p).second && p % 2 == 0, "parameters used once", row, p);
  }
}

// pack then unpack restores every byte, with a last panel that is not full.
void test_round_trip() {
  constexpr int n = 70, k_blocks = 3;
  std::vector<uint8_t> qweight(n * k_blocks * kBlockK / 2), qscale(n * k_blocks),
      qoffset(n * k_blocks);
  uint32_t state = 1;
  auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 24; };
  for (auto& v : qweight)
    v = next();
  for (auto& v : qscale)
    v = next() % 9;
  for (auto& v : qoffset)
    v = next() % 120;
  const LogicalWeight logical{qweight.data(), qscale.data(), qoffset.data(), n, k_blocks};
  std::vector<uint8_t> packed(2 * k_blocks * kBlockBytes, 0xEE);
  auto back_qweight = qweight, back_qscale = qscale, back_qoffset = qoffset;
  std::fill(back_qweight.begin(), back_qweight.end(), 0);
  std::fill(back_qscale.begin(), back_qscale.end(), 0);
  std::fill(back_qoffset.begin(), back_qoffset.end(), 0);
  const LogicalWeight back{back_qweight.data(), back_qscale.data(), back_qoffset.data(), n,
                           k_blocks};
  for (int panel = 0; panel < 2; ++panel) {
    for (int kb = 0; kb < k_blocks; ++kb) {
      uint8_t* const block = packed.data() + (panel * k_blocks + kb) * kBlockBytes;
      for (int row = 0; row < kBlockRows; ++row)
        expect(pack_block_row(logical, panel, kb, block_row(row), block), "feasible", panel, row);
      for (int row = 0; row < kBlockRows; ++row)
        unpack_block_row(block, panel, kb, block_row(row), back);
    }
  }
  expect(back_qweight == qweight, "codes restored", 0, 0);
  expect(back_qscale == qscale, "steps restored", 0, 0);
  expect(back_qoffset == qoffset, "offsets restored", 0, 0);
}

}  // namespace

int main() {
  test_bijection();
  test_fragment_map();
  test_param_positions_disjoint();
  test_round_trip();
  std::printf("%s\n", failures ? "packed layout: FAILED" : "packed layout: ok");
  return failures != 0;
}
