// What the processor offers and the operating system lets a program use.
#pragma once

namespace liquidgemm::cpu {

struct Processor {
  bool avx2 = false;         // with F16C and FMA, as on every processor that has it
  bool avx_vnni = false;     // with AVX2
  bool avx512_vnni = false;  // with AVX512 F, BW, DQ and VL
  bool amx = false;          // AMX-INT8, with AVX512-VNNI; the process has been given its tiles
  bool dotprod = false;
  bool i8mm = false;  // with dotprod
};

// Asks the processor; also asks Linux to let this process use AMX tiles, which it must be asked
// once.
Processor detect_processor();

}  // namespace liquidgemm::cpu
