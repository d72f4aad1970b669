#include "liquidgemm/cpu/kernels.hpp"

#include <atomic>
#include <cstring>

#include "liquidgemm/cpu/layout.hpp"
#include "liquidgemm/cpu/processor.hpp"
#include "liquidgemm/cpu/sets.hpp"
#include "liquidgemm/formats/formats.hpp"

namespace liquidgemm::cpu {
namespace {

// What layout.hpp says of the packed layouts is what formats/*.hpp derive.
static_assert(
    kGroup == kBlockK && kPanel == kBlockRows && Nibbles::kBlock == LiquidQuant::kBlockBytes &&
    Nibbles::kParams == LiquidQuant::kCodeBytes && kLargestCode == LiquidQuant::kMaxCode &&
    Bytes::kBlock == Int8::kBlockBytes && Groups32::kBlock == LiquidQuantG32::kBlockBytes &&
    Groups32::kParams == LiquidQuantG32::kCodeBytes &&
    SixBits::kBlock == LiquidQuant6::kBlockBytes && SixBits::kSecond == LiquidQuant6::kFirstBytes &&
    SixBits::kParams == LiquidQuant6::kCodeBytes && kLargestCode6 == LiquidQuant6::kMaxCode);

constexpr bool chunks_are_the_layout() {
  for (int chunk = 0; chunk < kPanelChunks; ++chunk) {
    for (int byte = 0; byte < kChunk; ++byte) {
      const int word = byte / 4;
      const int row = kBand * (chunk / kBandChunks) + chunk % kBandChunks + 8 * (word % 2);
      const LiquidQuant::CodePosition at =
          LiquidQuant::code_position(row, first_k(word) + byte % 4);
      const LiquidQuant::CodePosition later =
          LiquidQuant::code_position(row, first_k(word) + byte % 4 + 32);
      if (at.byte != kChunk * chunk + byte || at.shift != 0)
        return false;
      if (later.byte != at.byte || later.shift != 4)
        return false;
      if (LiquidQuant::param_position(row) != Nibbles::kParams + 4 * chunk + 2 * (word % 2))
        return false;
      if (LiquidQuant6::param_position(row) != SixBits::kParams + 4 * chunk + 2 * (word % 2))
        return false;
      for (int high = 0; high < 2; ++high) {
        const int params = high ? Groups32::kHighParams : Groups32::kParams;
        if (LiquidQuantG32::param_position(row, high) != params + 4 * chunk + 2 * (word % 2))
          return false;
      }
      // Word 0 or 1 of the chunk's four, 2 or 3, and 0 or 1 of the half chunk.
      const int half = word % 2, four = word / 4;
      if (LiquidQuant6::word_position(row, four, word / 2 % 2) != kChunk * chunk + 4 * word ||
          LiquidQuant6::word_position(row, four, 2) !=
              SixBits::kSecond + kChunk / 2 * chunk + 8 * four + 4 * half)
        return false;
      if (Int8::position(row, first_k(word) + byte % 4) != kChunk * chunk + byte ||
          Int8::position(row, first_k(word) + byte % 4 + 32) != kHigh + kChunk * chunk + byte)
        return false;
    }
  }
  return true;
}
static_assert(chunks_are_the_layout());

struct Supported {
  Kernels const* sets[5];
  int count = 0;

  void add(bool usable, Kernels const* (*kernels)()) {
    if (usable)
      sets[count++] = kernels();
  }

  Supported() {
    const Processor processor = detect_processor();
#if defined(__x86_64__)
    add(processor.amx, amx_kernels);
    add(processor.avx512_vnni, avx512_vnni_kernels);
    add(processor.avx_vnni, avx_vnni_kernels);
    add(processor.avx2, avx2_kernels);
#elif defined(__aarch64__)
    add(processor.i8mm, neon_i8mm_kernels);
    add(processor.dotprod, neon_dotprod_kernels);
#endif
    add(true, portable_kernels);
    (void)processor;
  }
};

Supported const& supported() {
  static const Supported found;
  return found;
}

std::atomic<Kernels const*>& chosen() {
  static std::atomic<Kernels const*> kernels{supported().sets[0]};
  return kernels;
}

}  // namespace

Kernels const* const* supported_kernels(int* count) {
  *count = supported().count;
  return supported().sets;
}

Kernels const* current_kernels() {
  return chosen().load(std::memory_order_relaxed);
}

bool choose_kernels(char const* name) {
  if (std::strcmp(name, "reference") == 0) {
    chosen() = nullptr;
    return true;
  }
  for (int i = 0; i < supported().count; ++i) {
    Kernels const* const kernels = supported().sets[i];
    if (*name == '\0' || std::strcmp(name, kernels->name) == 0) {
      chosen() = kernels;
      return true;
    }
  }
  return false;
}

}  // namespace liquidgemm::cpu
