// The rules of the files that are compiled for one instruction set.
//
// Each set has one .cpp file with compiler flags of its own (setup.py), which instantiates the
// templates of codes.hpp and others with a struct of that set's vector operations:
//
//   kTokens                               most tokens at a time: 1, 2, 4 or 8
//   Sums                                  one register of 32-bit sums: even lanes row g, odd g + 8
//   Codes codes(chunk)                    the 4-bit codes of one chunk, one per byte
//   Codes6 codes6(chunk, half a chunk)    the same of 6-bit codes; if their products need no other
//                                         multiply_add, derived from Codes
//   Steps steps(params)                   (s[g], s[g + 8]), repeated
//   multiply_add(sums, codes, x, steps)   sums + steps * (products of codes and x, per word)
//   multiply_add(sums, codes, x, steps, high_steps)
//                                         likewise, of low and of high nibbles by themselves
//   Int8s int8s(half of a chunk)          64 INT8 weights, with 128 added if kInt8sAreBiased
//   multiply_add(sums, int8s, x)          sums + products of weights and x, per word
//   add_offsets(params, sum, rows)        rows[0..16) += a * sum, for the 16 rows of a band
//   fold(sums, stride, rows)              rows[0..16) += the sums of a band's eight chunks
//
// Everything in those headers is in an anonymous namespace, and they use no function of the
// standard library: a function that two files compile with different flags would be merged into
// one by the linker, and the program would then run instructions that the processor lacks
// (tests/cpu/project/test_cpu_build.py looks at the symbols).
#pragma once

#include "liquidgemm/cpu/kernels.hpp"
#include "liquidgemm/cpu/layout.hpp"

namespace liquidgemm::cpu {
namespace {

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

}  // namespace
}  // namespace liquidgemm::cpu
