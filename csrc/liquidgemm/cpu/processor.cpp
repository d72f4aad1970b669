#include "liquidgemm/cpu/processor.hpp"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace liquidgemm::cpu {

#if defined(__x86_64__)

namespace {

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf ask(uint32_t leaf, uint32_t subleaf) {
  Leaf answer;
  __get_cpuid_count(leaf, subleaf, &answer.eax, &answer.ebx, &answer.ecx, &answer.edx);
  return answer;
}

constexpr bool has(uint32_t word, int bit) {
  return word >> bit & 1;
}

// The register states that the operating system saves.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool permits_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

Processor detect_processor() {
  constexpr uint64_t kAvxStates = 0x6, kAvx512States = 0xe6, kTileStates = 0x60000;
  Processor found;
  const Leaf basic = ask(1, 0);
  const bool os_saves = has(basic.ecx, 27);
  const uint64_t states = os_saves ? saved_states() : 0;
  const auto saves = [&](uint64_t wanted) { return (states & wanted) == wanted; };
  const Leaf extended = ask(7, 0), more = ask(7, 1);

  const bool fma = has(basic.ecx, 12), f16c = has(basic.ecx, 29);
  found.avx2 = saves(kAvxStates) && has(extended.ebx, 5) && fma && f16c;
  found.avx_vnni = found.avx2 && has(more.eax, 4);
  const bool f = has(extended.ebx, 16), dq = has(extended.ebx, 17);
  const bool bw = has(extended.ebx, 30), vl = has(extended.ebx, 31);
  const bool vnni = has(extended.ecx, 11);
  found.avx512_vnni = found.avx2 && saves(kAvx512States) && f && dq && bw && vl && vnni;
  const bool tiles = has(extended.edx, 24), int8_tiles = has(extended.edx, 25);
  found.amx = found.avx512_vnni && saves(kTileStates) && tiles && int8_tiles && permits_tiles();
  return found;
}

#elif defined(__aarch64__)

Processor detect_processor() {
  Processor found;
#if defined(__linux__)
  constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;  // of HWCAP and HWCAP2
  found.dotprod = getauxval(AT_HWCAP) & kDotprod;
  found.i8mm = found.dotprod && (getauxval(AT_HWCAP2) & kI8mm);
#endif
  return found;
}

#else

Processor detect_processor() {
  return {};
}

#endif

}  // namespace liquidgemm::cpu
