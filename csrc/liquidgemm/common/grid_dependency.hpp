// Programmatic dependent launch. CUTLASS has the same two functions, behind headers that take
// longer to compile than most of our kernels.
#pragma once

#include <cute/config.hpp>

namespace liquidgemm {

// The next kernel of the stream may start as soon as every CTA has done this or is finished.
CUTE_DEVICE void launch_dependent_grids() {
  asm volatile("griddepcontrol.launch_dependents;");
}

// Until the kernels before this one are complete and their writes are visible.
CUTE_DEVICE void wait_on_dependent_grids() {
  asm volatile("griddepcontrol.wait;");
}

}  // namespace liquidgemm
