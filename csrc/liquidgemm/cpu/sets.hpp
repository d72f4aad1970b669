// The table of each instruction set: one function per .cpp file. Only those of the architecture
// that is compiled for are defined.
#pragma once

#include "liquidgemm/cpu/kernels.hpp"

namespace liquidgemm::cpu {

Kernels const* portable_kernels();

Kernels const* avx2_kernels();
Kernels const* avx_vnni_kernels();
Kernels const* avx512_vnni_kernels();
Kernels const* amx_kernels();

Kernels const* neon_dotprod_kernels();
Kernels const* neon_i8mm_kernels();

}  // namespace liquidgemm::cpu
