// The packed layout against CuTe's own description of the wgmma A operand.
#include <cstdio>
#include <set>
#include <vector>

#include "liquidgemm/formats/a_operand.hpp"
#include "liquidgemm/formats/liquidquant.hpp"

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
      const LiquidQuant::CodePosition p = LiquidQuant::code_position(row, k);
      expect(p.byte >= 0 && p.byte < LiquidQuant::kCodeBytes && (p.shift == 0 || p.shift == 4),
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
      for (int value = 0; value < LiquidQuant::kCodeBytesPerThread; ++value) {
        const int row_k = layout(thread, value);
        const int row = row_k % kBlockRows;
        const int k = row_k / kBlockRows + step * kMmaK;
        const LiquidQuant::CodePosition p = LiquidQuant::code_position(row, k);
        expect(p.byte == LiquidQuant::kCodeBytesPerThread * thread + value && p.shift == 4 * step,
               "nibble is the fragment element", thread, value);
        // The thread's parameter word holds this row's (s, a) in the half of its register.
        const int register_half = value / 4 % 2;
        expect(
            LiquidQuant::param_position(row) ==
                LiquidQuant::kCodeBytes + 4 * LiquidQuant::param_word(thread) + 2 * register_half,
            "parameters of the row", thread, value);
      }
    }
  }
}

void test_param_positions_disjoint() {
  std::set<int> seen;
  for (int row = 0; row < kBlockRows; ++row) {
    const int p = LiquidQuant::param_position(row);
    expect(p >= LiquidQuant::kCodeBytes && p + 1 < LiquidQuant::kBlockBytes,
           "parameters inside the block", row, p);
    expect(seen.insert(p).second && p % 2 == 0, "parameters used once", row, p);
  }
}

// Packing moves words of four codes: they lie where LiquidQuant::code_position puts each single
// code.
void test_packed_codes_lie_at_their_positions() {
  constexpr int k_blocks = 2;
  std::vector<uint8_t> qweight(kBlockRows * k_blocks * kBlockK / 2), qscale(kBlockRows * k_blocks),
      qoffset(kBlockRows * k_blocks);
  for (size_t i = 0; i < qweight.size(); ++i)
    qweight[i] = static_cast<uint8_t>(i * 0x9e3779b1u >> 24);
  for (size_t i = 0; i < qscale.size(); ++i) {
    qscale[i] = static_cast<uint8_t>(i % 9);
    qoffset[i] = static_cast<uint8_t>(i % 121);
  }
  const LiquidQuant::Logical logical{qweight.data(), qscale.data(), qoffset.data(), kBlockRows,
                                     k_blocks};
  for (int kb = 0; kb < k_blocks; ++kb) {
    std::vector<uint8_t> block(LiquidQuant::kBlockBytes);
    for (int row = 0; row < kBlockRows; ++row)
      LiquidQuant::pack_row(logical, 0, kb, LiquidQuant::row(row), block.data());
    for (int row = 0; row < kBlockRows; ++row) {
      const int group = row * k_blocks + kb;
      for (int k = 0; k < kBlockK; ++k) {
        const LiquidQuant::CodePosition p = LiquidQuant::code_position(row, k);
        const int code = qweight[(group * kBlockK + k) / 2] >> (4 * (k % 2)) & 0xf;
        expect((block[p.byte] >> p.shift & 0xf) == code, "code at its position", row, k);
      }
      expect(block[LiquidQuant::param_position(row)] == qscale[group], "step at its position", row,
             kb);
      expect(block[LiquidQuant::param_position(row) + 1] == qoffset[group],
             "offset at its position", row, kb);
    }
  }
}

// Every (s, a) with every code in every place of a row: refused exactly if that code overflows.
void test_feasibility() {
  std::vector<uint8_t> block(LiquidQuant::kBlockBytes);
  for (int step = 0; step < 256; ++step) {
    for (int offset = 0; offset < 256; ++offset) {
      for (int code = 0; code <= LiquidQuant::kMaxCode; ++code) {
        std::vector<uint8_t> qweight(kBlockK / 2);
        const int k = (step + offset + code) % kBlockK;
        qweight[k / 2] = static_cast<uint8_t>(code << (4 * (k % 2)));
        uint8_t s = static_cast<uint8_t>(step), a = static_cast<uint8_t>(offset);
        const LiquidQuant::Logical logical{qweight.data(), &s, &a, 1, 1};
        const bool packed = LiquidQuant::pack_row(logical, 0, 0, LiquidQuant::row(0), block.data());
        expect(packed == LiquidQuant::is_feasible(code, step, offset), "infeasible codes refused",
               step, offset);
      }
    }
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
  const LiquidQuant::Logical logical{qweight.data(), qscale.data(), qoffset.data(), n, k_blocks};
  std::vector<uint8_t> packed(2 * k_blocks * LiquidQuant::kBlockBytes, 0xEE);
  auto back_qweight = qweight, back_qscale = qscale, back_qoffset = qoffset;
  std::fill(back_qweight.begin(), back_qweight.end(), 0);
  std::fill(back_qscale.begin(), back_qscale.end(), 0);
  std::fill(back_qoffset.begin(), back_qoffset.end(), 0);
  const LiquidQuant::Logical back{back_qweight.data(), back_qscale.data(), back_qoffset.data(), n,
                                  k_blocks};
  for (int panel = 0; panel < 2; ++panel) {
    for (int kb = 0; kb < k_blocks; ++kb) {
      uint8_t* const block = packed.data() + (panel * k_blocks + kb) * LiquidQuant::kBlockBytes;
      for (int row = 0; row < kBlockRows; ++row)
        expect(LiquidQuant::pack_row(logical, panel, kb, LiquidQuant::row(row), block), "feasible",
               panel, row);
      for (int row = 0; row < kBlockRows; ++row)
        LiquidQuant::unpack_row(block, panel, kb, LiquidQuant::row(row), back);
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
  test_packed_codes_lie_at_their_positions();
  test_feasibility();
  test_round_trip();
  std::printf("%s\n", failures ? "packed layout: FAILED" : "packed layout: ok");
  return failures != 0;
}
